"""The trace against numbers worked out apart."""

import math

import numpy as np
import pytest
import torch
from toys import SmoothCNN, smooth_noise_predictor, write_tiny_pipeline

from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import DataError
from nrcg.guidance.trace import QUANTITIES, Trace, TraceRecorder
from nrcg.report.trace_figure import save_trace_figure

SCHEDULE = Schedule.linear(6, 0.02, 0.5)


def test_quantities_by_hand():
    """Three steps of a trajectory with a gradient every second step; each number from its definition."""
    predict = smooth_noise_predictor()
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 1, scale=3.0, stabilizer=EMA(0.5), every_k=2)
    recorder = TraceRecorder()
    generator = torch.Generator().manual_seed(0)
    images = {t: torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for t in (6, 5, 4)}
    for t, x in images.items():
        prediction, _ = guidance(x, t, predict, SCHEDULE)
        recorder.record(x, t, prediction, guidance, SCHEDULE)
    trace = recorder.result(2)
    assert trace.t.tolist() == [6, 5, 4]

    fresh = ClassifierGuidance(SmoothCNN(3).double(), 1)
    first, third = (fresh.gradient(images[t], t, predict, SCHEDULE) for t in (6, 4))
    norm, nan = np.linalg.norm, math.nan

    def cosine(a, b):
        return a @ b / norm(a) / norm(b)

    for sample in range(2):
        g1, g3 = first.grad[sample].flatten().numpy(), third.grad[sample].flatten().numpy()
        m1, m2 = 0.5 * g1, 0.75 * g1  # the second step is fed with the first gradient again
        m3 = 0.5 * m2 + 0.5 * g3
        expected = {
            "grad_norm": [norm(g1), nan, norm(g3)],
            "grad_cosine": [nan, nan, cosine(g1, g3)],
            "guide_norm": [norm(m1), norm(m2), norm(m3)],
            "guide_cosine": [nan, 1.0, cosine(m2, m3)],
            "log_prob": [float(torch.log_softmax(s.logits[sample], 0)[1]) if s else nan for s in (first, None, third)],
            "clipped": [
                float((SCHEDULE.pred_x0(x, predict(x, t), t)[sample].abs() > 1).double().mean())
                for t, x in images.items()
            ],
        }
        for name in QUANTITIES:
            found = getattr(trace, name)[sample]
            assert found == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name  # stored as float32


def test_tiny_gradients_have_a_cosine():
    recorder, guidance = TraceRecorder(), ClassifierGuidance(SmoothCNN(3), 0)
    x = torch.zeros(1, 3, 8, 8)
    prediction, _ = guidance(x, 3, smooth_predictor32, SCHEDULE)
    for size in (1e-30, 2e-30):
        guidance.last.grad.fill_(size)
        guidance.guide = guidance.last.grad.clone()
        recorder.record(x, 3, prediction, guidance, SCHEDULE)
        guidance.last = type(guidance.last)(guidance.last.grad.clone(), prediction, guidance.last.logits)
    assert recorder.result(1).grad_cosine[0, 1] == pytest.approx(1.0)


def smooth_predictor32(x, t):
    return torch.tanh(x + 0.1 * t)


@pytest.fixture
def pipe(tmp_path):
    return GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path / "ddpm"))


def test_a_pipelines_trace_is_the_same_whatever_the_batch(pipe):
    def run(**settings):
        guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=2.0, stabilizer=EMA(0.8))
        return pipe(num_samples=5, guidance=guidance, on_step=lambda done: None, **settings)

    whole, parts, without = run(batch_size=5, trace=True), run(batch_size=2, trace=True), run(batch_size=5)
    assert without.trace is None
    assert torch.equal(without.samples, whole.samples)  # watching changes nothing
    assert whole.trace.t.tolist() == [6, 5, 4, 3, 2]  # the last step has no variance to shift by
    for name in QUANTITIES:
        found, expected = getattr(parts.trace, name), getattr(whole.trace, name)
        assert found.shape == (5, 5) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)  # float32 rounding, as for the samples


def test_saving_and_joining(pipe, tmp_path):
    guidance = ClassifierGuidance(SmoothCNN(3), 1, every_k=2)
    trace = pipe(num_samples=3, batch_size=2, guidance=guidance, trace=True, on_step=lambda done: None).trace
    trace.save(tmp_path / "trace.npz")
    joined = Trace.join([Trace.load(tmp_path / "trace.npz"), trace])
    np.testing.assert_array_equal(joined.grad_norm, np.concatenate([trace.grad_norm] * 2))
    means = joined.mean()
    assert np.isnan(means["grad_norm"]).tolist() == [False, True, False, True, False]  # every second step
    assert means["clipped"] == pytest.approx(trace.clipped.mean(axis=0), rel=1e-6)
    other = Trace(trace.t + 1, *(getattr(trace, name) for name in QUANTITIES))
    with pytest.raises(ValueError, match="traces of the same steps"):
        Trace.join([trace, other])
    (tmp_path / "trace.npz").write_bytes((tmp_path / "trace.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"trace.npz: no trace \("):
        Trace.load(tmp_path / "trace.npz")


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_figure(pipe, tmp_path, ending, begins):
    guidance = ClassifierGuidance(SmoothCNN(3), 1, stabilizer=EMA(0.8))
    trace = pipe(num_samples=2, guidance=guidance, trace=True, on_step=lambda done: None).trace
    path = tmp_path / f"trace.{ending}"
    save_trace_figure(path, trace)
    assert path.read_bytes().startswith(begins)
