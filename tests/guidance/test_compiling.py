"""Compiled U-Nets and half precision: the samples of the plain network, whatever the batch. No backend needs a GPU."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from toys import TINY_STEPS, SmoothCNN, write_tiny_pipeline

from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline
from nrcg.diffusion import compiling
from nrcg.diffusion.compiling import GRAPHS, compiled_unet, forward_flop, resolve_compile
from nrcg.training.ddpm import ddpm_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A U-Net that has seen some digits: gradients of random weights are tamer than those of trained ones."""
    folder = write_tiny_pipeline(tmp_path_factory.mktemp("ddpm"))
    pipe = GuidedDDPMPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images[:512]).float()[:, None].repeat(1, 3, 1, 1) / 8 - 1
    unet, optimizer = pipe.unet.train(), torch.optim.AdamW(pipe.unet.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        x0, t = images[torch.randperm(512)[:32]], torch.randint(1, TINY_STEPS + 1, (32,))
        loss = ddpm_loss(unet, pipe.schedule(), x0, t, torch.randn_like(x0), torch.float32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(trained):
    return GuidedDDPMPipeline.from_pretrained(trained)


@pytest.fixture
def compiler(monkeypatch, request):
    """Traces the network as the GPU's compiler does, in slow tests its backward pass too, and runs what it traced;
    holds what was traced."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(module, inputs, **settings):
        graphs.append(module)
        slow = request.node.get_closest_marker("slow") is not None
        return aot_eager(module, inputs, **settings) if slow else module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return graphs


def draw(pipe, guidance=None, count=5, **settings):
    settings = {"batch_size": 3, "seed": 1, "start": "standard_normal"} | settings
    return pipe(count, guidance=guidance, on_step=lambda done: None, **settings)


def guidance(**settings):
    return ClassifierGuidance(SmoothCNN(3), 1, **{"scale": 2.0, "stabilizer": EMA(0.9)} | settings)


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        [{"skip_above": 0.34}],
        # The last: it changes the network.
        pytest.param(
            [None, {}, {"input": "x_t"}, {"every_k": 2}, {"grad_mode": "no_jacobian"}, {"grad_mode": "checkpoint"}],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_u_net_draws_the_same_samples(pipe, compiler, choices):
    for settings in choices:
        guide, trace = None if settings is None else guidance(**settings), settings is not None
        eager = draw(pipe, guide, trace=trace)
        compiled = draw(pipe, guide, trace=trace, compile="on")
        # The same operations in float32, fused in another order.
        torch.testing.assert_close(compiled.samples, eager.samples, rtol=0, atol=1e-4, msg=str(settings))
        if trace:
            assert compiled.trace.log_prob.shape == (5, len(eager.trace.t))
            np.testing.assert_allclose(compiled.trace.log_prob, eager.trace.log_prob, atol=1e-3, err_msg=str(settings))
    # Without a gradient and with one, each once more for batches of any size; with one again where it checkpoints.
    assert 2 <= len(compiler) <= 6
    known = len(compiler)
    draw(pipe, guide, seed=2)
    draw(pipe, guide, compile="on", seed=2)
    assert len(compiler) == known, "what was compiled is used again"


@pytest.mark.slow
def test_a_compiled_u_net_keeps_the_guard_of_non_finite_samples(pipe, compiler):
    class Breaks(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * torch.where(x[:, 0, 3, 3, None] > 0.7, torch.nan, 1.0)

    eager, compiled = (draw(pipe, ClassifierGuidance(Breaks(), 0), compile=choice) for choice in ("off", "on"))
    assert eager.nonfinite.tolist() == compiled.nonfinite.tolist()
    assert 0 < eager.nonfinite.sum() < 5 and compiled.samples.isfinite().all()


def test_where_the_compiler_fails_the_network_runs_as_it_is(pipe, monkeypatch, caplog):
    def broken(module, inputs):
        raise OSError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", broken)
    with caplog.at_level("WARNING"):
        compiled = draw(pipe, guidance(), compile="on")
    torch.testing.assert_close(compiled.samples, draw(pipe, guidance()).samples, rtol=0, atol=0)
    assert "the U-Net is not compiled:" in caplog.text and "no compiler here" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["on", "graphs"])  # on a CPU it makes no graphs, but takes the options
def test_the_default_compiler_draws_the_same_samples(pipe, how):
    torch._dynamo.reset()
    compiled = draw(pipe, guidance(skip_above=0.34), compile=how).samples
    torch.testing.assert_close(compiled, draw(pipe, guidance(skip_above=0.34)).samples, rtol=0, atol=1e-3)


@pytest.fixture
def graphs(monkeypatch):
    """A compiler whose functions write their results, forward and backward, to the same memory at every call, as CUDA
    graphs do; holds the options it was given."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def replayed(module, _):
        kept = {}

        def run(*inputs):
            outputs = module(*inputs)
            key = tuple(one.shape if isinstance(one, torch.Tensor) else one for one in outputs)
            known = kept.setdefault(key, [one.clone() if isinstance(one, torch.Tensor) else one for one in outputs])
            return [
                memory.copy_(one).detach() if isinstance(one, torch.Tensor) else one
                for memory, one in zip(known, outputs, strict=True)
            ]

        return make_boxed_func(run)

    def backend(module, inputs, options=None):
        seen.append(options)
        return aot_autograd(fw_compiler=replayed, bw_compiler=replayed)(module, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return seen


def test_results_of_a_graph_outlive_its_next_replay(graphs):
    """y = x^2 with gradient 2 x, each right after another pass."""

    class Square(nn.Module):
        def forward(self, x, t, return_dict):
            return (x * x,)

    compiled, plain = (compiled_unet(Square(), how) for how in ("graphs", "on"))

    def both(run):
        results = []
        for value in (2.0, 3.0):
            x = torch.full((1, 1), value, requires_grad=True)
            y = run(x, torch.zeros(1))
            results += [torch.autograd.grad(y.sum(), x)[0], y.detach()]
        return [one.item() for one in results]

    assert both(compiled) == [4.0, 4.0, 6.0, 9.0]
    assert both(plain) == [6.0, 9.0, 6.0, 9.0], "this compiler does not do as graphs do"
    assert graphs == [GRAPHS, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [None, {"every_k": 2}, {"skip_above": 0.34}, {"grad_mode": "no_jacobian"}],
)
def test_a_u_net_as_graphs_draws_the_same_samples(pipe, graphs, settings):
    """every_k uses a gradient again after another pass of the U-Net."""
    guide = None if settings is None else guidance(stabilizer=None, **settings)
    compiled = draw(pipe, guide, compile="graphs").samples
    torch.testing.assert_close(compiled, draw(pipe, guide).samples, rtol=0, atol=1e-4)
    assert graphs and set(map(str, graphs)) == {str(GRAPHS)}


def test_long_jobs_on_a_gpu_are_compiled():
    def refuse():
        raise AssertionError("counted without need")

    for choice in ("on", "off", "graphs"):
        assert resolve_compile(choice, CPU, refuse) == resolve_compile(choice, CUDA, refuse) == choice
    assert resolve_compile("auto", CPU, refuse) == "off"
    assert resolve_compile("auto", CUDA, lambda: 7.0, worth=7.0) == "on"
    assert resolve_compile("auto", CUDA, lambda: 6.9, worth=7.0) == "off"
    with pytest.raises(ValueError, match="compile: 'yes' is unknown; allowed: auto, on, off, graphs"):
        resolve_compile("yes", CPU, refuse)


def test_arithmetic_by_hand():
    """A 3 x 3 convolution of 3 to 4 channels on 8 x 8 pixels: 2 * 9 * 3 * 4 * 64."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x, t):
            return self.layer(x)

    assert forward_flop(One(), (3, 8, 8)) == 13824


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [False, True], ids=["autocast", "weights"])
def test_a_sample_in_half_precision_has_the_same_bytes_in_every_batch_of_that_size(pipe, dtype, weights):
    """The last batch is filled up: of 7 samples in threes, the last is drawn beside two that nobody asked for."""
    if weights:
        pipe.with_weights(dtype)
    settings = {"precision": torch.float32 if weights else dtype, "trace": True}
    whole = draw(pipe, guidance(), 7, **settings)
    assert whole.samples.shape[0] == len(whole.nonfinite) == len(whole.trace.log_prob) == 7
    shifted = draw(pipe, guidance(), 5, first_sample=2, **settings)
    assert torch.equal(whole.samples[2:], shifted.samples)
    one_more = draw(pipe, guidance(), 8, **settings)
    assert torch.equal(whole.samples, one_more.samples[:7])


def test_float16_is_closer_to_float32_than_bfloat16(pipe):
    """What `auto` takes on a GPU: the gradient through the U-Net keeps its direction."""
    schedule, x = pipe.schedule(), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guide = guidance(stabilizer=None)

    def gradient(precision):
        return guide.gradient(x, TINY_STEPS, pipe.noise_predictor(precision), schedule).grad.flatten(1)

    expected = gradient(torch.float32)
    error = {
        dtype: float((1 - torch.cosine_similarity(gradient(dtype), expected)).median())
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert error[torch.float16] < error[torch.bfloat16] / 4, error


def test_weights_of_another_type_draw_almost_the_same(pipe):
    expected = draw(pipe, guidance()).samples
    half = copy.copy(pipe).with_weights("float16")
    assert next(half.unet.parameters()).dtype == torch.float16
    assert (draw(half, guidance()).samples - expected).abs().mean() < 0.02
