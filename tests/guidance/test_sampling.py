"""The sampler against diffusers, against distributions known in closed form, and its promises about samples."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import nn
from toys import (
    TINY_SIZE,
    TINY_STEPS,
    ClassOfTwoGaussians,
    SmoothCNN,
    TimeAwareGuidance,
    TwoGaussians,
    ddpm_sample,
    log_prob,
    vp_schedule,
    write_tiny_pipeline,
)

from nrcg import EMA, Adam, ClassifierGuidance, GuidedDDPMPipeline, Identity, Interval
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.storage import DATA_MEAN_FILE
from nrcg.errors import DataError
from nrcg.guidance.guidance import GuidedStep
from nrcg.guidance.sampling import START_STREAM, start_samples

SHAPE = (3, TINY_SIZE, TINY_SIZE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_pipeline(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture
def pipe(folder):
    return GuidedDDPMPipeline.from_pretrained(folder)


def draw(pipe, num_samples=4, **settings):
    return pipe(num_samples=num_samples, on_step=lambda done: None, **settings)


# --- the plain DDPM is diffusers' ------------------------------------------------------------------------------------


def feed_diffusers(monkeypatch, seed: int, samples: range) -> None:
    """Let diffusers draw our samples' noise: x_T, then a draw for each step that leaves t = T..2."""
    streams = iter([START_STREAM, *range(TINY_STEPS, 1, -1)])

    def our_noise(shape, **_):
        return sample_noise(seed, samples, next(streams), shape[1:])

    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", our_noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", our_noise)


@pytest.mark.parametrize("guidance", [None, ClassifierGuidance(SmoothCNN(3), 0, scale=0.0)], ids=["none", "scale 0"])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_plain_sampling_equals_diffusers_pipeline(tmp_path, monkeypatch, clip_sample, guidance):
    write_tiny_pipeline(tmp_path, clip_sample=clip_sample)
    ours = draw(GuidedDDPMPipeline.from_pretrained(tmp_path), 3, batch_size=3, seed=7, guidance=guidance)
    theirs = DDPMPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    feed_diffusers(monkeypatch, 7, range(3))
    expected = theirs(batch_size=3, num_inference_steps=TINY_STEPS, output_type="np").images
    # Six steps in float32; diffusers cumulates its products in float32, ours are float64.
    torch.testing.assert_close(
        (ours.samples / 2 + 0.5).permute(0, 2, 3, 1), torch.from_numpy(expected), rtol=0, atol=1e-5
    )
    assert not ours.nonfinite.any()


# --- distributions in closed form ------------------------------------------------------------------------------------


def gaussian_after_sampling(data: TwoGaussians, schedule: Schedule) -> tuple[float, float]:
    """Mean and standard deviation that the DDPM sampler itself has after T steps on one Gaussian: all steps are linear.

    x_{t-1} = a x0hat + b x_t + noise, x0hat = E[x_0 | x_t].
    """
    mean, variance = 0.0, 1.0
    for t in range(schedule.num_steps, 0, -1):
        abar = float(schedule.abar[t])
        centre, marginal = data.marginal(t)
        gain = math.sqrt(abar) * data.std**2 / marginal
        offset = data.centre - gain * centre
        a, b, sigma = schedule.posterior(t)
        mean = (a * gain + b) * mean + a * offset
        variance = (a * gain + b) ** 2 * variance + sigma
    return mean, math.sqrt(variance)


class OneGaussian(TwoGaussians):
    """Only the component at +centre."""

    def predict_noise(self, x, t):
        centre, variance = self.marginal(t)
        return math.sqrt(1.0 - float(self.schedule.abar[t])) * (x - centre) / variance


@pytest.mark.parametrize("num_steps", [25, 400])
def test_a_gaussian_is_sampled_with_its_mean_and_variance(num_steps):
    schedule = vp_schedule(num_steps)
    data = OneGaussian(schedule, centre=0.3, std=0.4)
    samples, shape = range(256), (1, 8, 8)
    x = start_samples(schedule, 0, samples, shape, CPU)
    x, nonfinite = ddpm_sample(x, data.predict_noise, schedule, seed=0, samples=samples, clip_pred_x0=False)
    n = x.numel()
    mean, std = gaussian_after_sampling(data, schedule)
    # Four standard errors of 16,384 independent pixels: std / sqrt(n) and std / sqrt(2 n).
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert float(x.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    # The discretisation of the variance goes as 1 / T (0.088, 0.030, 0.009 are lost at 25, 100, 400 steps).
    assert mean == pytest.approx(0.3, abs=1e-4)
    assert std == pytest.approx(0.4, abs=4 / num_steps)
    assert not nonfinite.any()


def sample_two_gaussians(num_steps, guide=None, num_samples=4000, seed=0):
    schedule = vp_schedule(num_steps)
    data = TwoGaussians(schedule, centre=0.6, std=0.2)
    samples = range(num_samples)
    x, nonfinite = ddpm_sample(
        start_samples(schedule, seed, samples, (1, 1, 1), CPU),
        data.predict_noise,
        schedule,
        seed=seed,
        samples=samples,
        guidance=guide(data) if guide else None,
        clip_pred_x0=False,
    )
    assert not nonfinite.any()
    return x.flatten()


def exact_guide(target: int, scale: float = 1.0):
    """Guidance by the exact p(y | x_t), at each t its own."""
    return lambda data: TimeAwareGuidance(ClassOfTwoGaussians(data), target, scale=scale, input="x_t")


@pytest.mark.parametrize("num_steps", [50, 200])
def test_two_gaussians_are_sampled_in_equal_shares(num_steps):
    x = sample_two_gaussians(num_steps)
    # Four standard errors of 4000 coins.
    assert float((x > 0).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    # std^2 = 0.6^2 + 0.2^2, with the discretisation's 1 / T.
    assert float(x.std()) == pytest.approx(0.4**0.5, abs=2 / num_steps)


@pytest.mark.parametrize("target, sign", [(0, -1), (1, 1)])
@pytest.mark.parametrize("num_steps", [50, 200])
def test_guidance_by_the_exact_classifier_samples_the_class(num_steps, target, sign):
    """eq. 1 at s = 1: the posterior p(x_0 | y) is one of the two Gaussians, N(+-0.6, 0.2^2)."""
    x = sign * sample_two_gaussians(num_steps, exact_guide(target))
    # The first-order shift s * Sigma * g is exact as T grows: errors of about 3 / T (0.06, 0.02, 0.01 are seen).
    assert float(x.mean()) == pytest.approx(0.6, abs=4 / num_steps)
    assert float(x.std()) == pytest.approx(0.2, abs=4 / num_steps)
    assert float((x > 0).float().mean()) > 1 - 4 / num_steps


def test_a_larger_scale_makes_the_class_likelier():
    classes = TwoGaussians(vp_schedule(50), centre=0.6, std=0.2)
    mean_log_prob, shares = [], []
    for scale in (0.0, 0.25, 0.5, 1.0, 3.0):
        x = sample_two_gaussians(50, exact_guide(1, scale), num_samples=1000)
        mean_log_prob.append(float(nn.functional.logsigmoid(classes.logit(x, 0)).mean()))
        shares.append(float((x > 0).float().mean()))
    assert mean_log_prob == sorted(mean_log_prob) and len(set(mean_log_prob)) == 5
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(1000)) and shares[-1] > 0.99


class SharpClassifier(nn.Module):
    """The exact classifier of clean images of `TwoGaussians`, never told of noise: the paper's non-robust one."""

    def forward(self, x):
        return 2 * 0.6 / 0.2**2 * x.flatten(1)


@pytest.mark.parametrize(
    "stabilizer, scale", [(Identity(), 1.0), (EMA(0.9), 3.0), (Adam(0.9, 0.999, 1e-4), 0.3)], ids=repr
)
def test_a_classifier_of_clean_images_guides_through_the_denoised_image(stabilizer, scale):
    x = sample_two_gaussians(
        100,
        lambda _: ClassifierGuidance(SharpClassifier(), 1, scale=scale, input="pred_x0", stabilizer=stabilizer),
        num_samples=500,
    )
    # From one half; four standard errors of 500 coins are 0.09.
    assert float((x > 0).float().mean()) > 0.7


# --- a sample depends on (seed, index) alone -------------------------------------------------------------------------


GUIDED = {
    "none": lambda: None,
    "ema": lambda: ClassifierGuidance(SmoothCNN(3), 1, scale=5.0, stabilizer=EMA(0.8)),
    "adam": lambda: ClassifierGuidance(SmoothCNN(3), 1, scale=0.1, stabilizer=Adam()),
    "x_t": lambda: ClassifierGuidance(SmoothCNN(1), 0, scale=5.0, input="x_t"),
}


@pytest.mark.parametrize("guide", GUIDED.values(), ids=GUIDED)
def test_samples_depend_neither_on_the_batch_size_nor_on_the_runs_parts(pipe, guide):
    guidance = guide()
    whole = draw(pipe, 5, batch_size=5, seed=3, guidance=guidance).samples
    # Convolutions of another batch size may sum in another order: float32 rounding over six steps, times 7 by
    # 1 / sqrt(abar_T) and the scale. A neighbour's noise or gradient would change samples by 0.1 and more.
    for batch_size in (1, 2):
        parts = draw(pipe, 5, batch_size=batch_size, seed=3, guidance=guidance).samples
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)
    last = draw(pipe, 3, batch_size=3, seed=3, first_sample=2, guidance=guidance).samples
    first = draw(pipe, 2, batch_size=3, seed=3, guidance=guidance).samples  # drawn after the last: no order
    torch.testing.assert_close(torch.cat([first, last]), whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("stabilizer", [Identity(), EMA(0.9), Adam(0.9, 0.999, 1e-4)], ids=repr)
def test_neighbours_and_order_change_nothing_on_exact_models(stabilizer):
    """Without convolutions nothing is left to round differently but tanh and log in vectors or alone: 1e-7 a step."""
    schedule = vp_schedule(50)
    data = TwoGaussians(schedule, centre=0.6, std=0.2)
    guide = TimeAwareGuidance(ClassOfTwoGaussians(data), 1, scale=0.5, input="x_t", stabilizer=stabilizer)

    def run(samples):
        x = start_samples(schedule, 2, samples, (1, 1, 1), CPU)
        return ddpm_sample(x, data.predict_noise, schedule, seed=2, samples=samples, guidance=guide)[0]

    whole = run(range(9))
    order = [8, 3, 5, 0]
    torch.testing.assert_close(run(order), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(run([4]), whole[[4]], rtol=0, atol=1e-5)


def test_samples_and_seeds_differ(pipe):
    first, other = (draw(pipe, 3, seed=seed).samples for seed in (0, 1))
    everything = torch.cat([first, other]).flatten(1)
    assert (torch.pdist(everything) > 0.1).all()


def test_each_step_has_noise_of_its_own(monkeypatch):
    streams = []

    def record(seed, samples, step, shape, device="cpu"):
        streams.append(step)
        return sample_noise(seed, samples, step, shape, device)

    monkeypatch.setattr("nrcg.guidance.sampling.sample_noise", record)
    schedule = Schedule.linear(5, 0.1, 0.5)
    x = start_samples(schedule, 0, range(2), (1, 2, 2), CPU)
    ddpm_sample(x, lambda x, t: 0 * x, schedule, seed=0, samples=range(2))
    assert streams == [START_STREAM, 5, 4, 3, 2]  # none at t = 1
    assert len(set(streams)) == 5


# --- algorithm 1 by hand ---------------------------------------------------------------------------------------------


class ConstantGuide(ClassifierGuidance):
    """Gives the gradient 1 and records what it was asked."""

    def __init__(self, scale, stabilizer=None, every_k=1):
        super().__init__(nn.Identity(), 0, scale, stabilizer=stabilizer, every_k=every_k)
        self.asked = []

    def gradient(self, x_t, t, predict_noise, schedule):
        self.asked.append(t)
        prediction = as_prediction(predict_noise(x_t, t)).detach()
        return GuidedStep(torch.ones_like(x_t), prediction, torch.zeros(len(x_t), 2))


def test_two_guided_steps_by_hand():
    schedule = Schedule(torch.tensor([0.36, 0.75], dtype=torch.float64))  # abar 0.64, 0.16
    guide = ConstantGuide(scale=2.0)
    x, _ = ddpm_sample(torch.full((1, 1, 1, 1), 0.2), lambda x, t: 0 * x, schedule, seed=0, samples=[4], guidance=guide)
    # t = 2: x0hat = 0.2 / 0.4. a = 0.8 * 0.75 / 0.84, b = 0.5 * 0.36 / 0.84, Sigma = 0.36 / 0.84 * 0.75.
    sigma = 0.36 / 0.84 * 0.75
    mean = 0.8 * 0.75 / 0.84 * 0.5 + 0.5 * 0.36 / 0.84 * 0.2 + 2.0 * sigma * 1.0
    x1 = mean + math.sqrt(sigma) * float(sample_noise(0, [4], 2, (1, 1, 1)))
    # t = 1: Sigma = 0 and x_0 = x0hat = x_1 / 0.8, clipped.
    assert float(x) == pytest.approx(min(x1 / 0.8, 1.0), abs=1e-6)  # float32
    assert guide.asked == [2]  # at t = 1 there is no variance to shift by


def test_the_stabilizer_smooths_and_starts_anew():
    """With a constant gradient, EMA 0.5 from zero leaves 1/2 of the shift at the first step."""
    schedule = Schedule(torch.tensor([0.36, 0.75], dtype=torch.float64))
    x = torch.zeros(1, 1, 1, 1)
    settings = {"seed": 0, "samples": [0], "clip_pred_x0": False}
    shifts = {}
    plain, _ = ddpm_sample(x, lambda x, t: 0 * x, schedule, **settings)
    smoothed = ConstantGuide(0.1, EMA(0.5))
    for name, guide in (("whole", ConstantGuide(0.1)), ("half", smoothed), ("again", smoothed)):
        shifts[name] = float(ddpm_sample(x, lambda x, t: 0 * x, schedule, guidance=guide, **settings)[0] - plain)
    assert shifts["half"] == pytest.approx(shifts["whole"] / 2, rel=1e-4)  # float32 differences
    assert shifts["again"] == shifts["half"]


# --- non-finite samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
# No gradient is taken at t = 1.
@pytest.mark.parametrize(("where", "broken_at"), [("eps", 5), ("eps", 3), ("eps", 1), ("gradient", 5), ("gradient", 2)])
def test_a_non_finite_sample_is_frozen_counted_and_alone(where, broken_at, value):
    schedule = Schedule.linear(5, 0.1, 0.5)
    samples = range(4)
    seen = {}

    def run(broken: bool):
        def predict_noise(x, t):
            seen[t] = x.detach().clone()
            eps = torch.sin(x + t)
            if broken and where == "eps" and t == broken_at:
                eps = eps.clone()
                eps[2, 0, 1, 1] = value
            return eps

        class Guide(ConstantGuide):
            def gradient(self, x_t, t, predict_noise, schedule):
                step = super().gradient(x_t, t, predict_noise, schedule)
                if broken and where == "gradient" and t == broken_at:
                    step.grad[2, 0, 1, 1] = value
                return step

        x = start_samples(schedule, 0, samples, (1, 2, 2), CPU)
        guide = Guide(1.0, EMA(0.9))
        # Unclipped: clipping would make a finite image of an infinite one.
        return ddpm_sample(x, predict_noise, schedule, seed=0, samples=samples, guidance=guide, clip_pred_x0=False)

    whole, none = run(broken=False)
    x, nonfinite = run(broken=True)
    others = [0, 1, 3]
    assert torch.equal(x[others], whole[others]) and not none.any()
    assert nonfinite.tolist() == [False, False, True, False]
    assert torch.equal(x[2], seen[broken_at][2])  # as it was before the step that broke it


def test_the_pipeline_hands_out_finite_pictures_all_the_same(pipe):
    out = draw(pipe, 3, guidance=ClassifierGuidance(SmoothCNN(3), 0, scale=1e39))
    assert out.nonfinite.tolist() == [True] * 3
    assert out.samples.isfinite().all() and len(out.images) == 3


# --- the start -------------------------------------------------------------------------------------------------------


def test_start_by_hand():
    schedule = Schedule.linear(4, 0.2, 0.5)
    noise = sample_noise(1, [5, 6], START_STREAM, (1, 2, 2))
    assert torch.equal(start_samples(schedule, 1, [5, 6], (1, 2, 2), CPU), noise)
    abar = float(schedule.abar[4])
    mean = torch.tensor([[[0.5, -0.5], [1.0, 0.0]]])
    expected = abar**0.5 * mean + (1 - abar) ** 0.5 * noise
    torch.testing.assert_close(start_samples(schedule, 1, [5, 6], (1, 2, 2), CPU, mean), expected)


@pytest.fixture
def folder_with_mean(tmp_path):
    write_tiny_pipeline(tmp_path)
    np.save(tmp_path / DATA_MEAN_FILE, np.full(SHAPE, 0.8, np.float32))
    return tmp_path


def test_auto_takes_the_mean_image_where_there_is_one(folder_with_mean, pipe):
    with_mean = GuidedDDPMPipeline.from_pretrained(folder_with_mean)
    drawn = {start: draw(with_mean, start=start).samples for start in ("auto", "data_mean", "standard_normal")}
    assert torch.equal(drawn["auto"], drawn["data_mean"])
    assert torch.equal(drawn["standard_normal"], draw(pipe, start="auto").samples)
    assert torch.equal(drawn["standard_normal"], draw(pipe, start="standard_normal").samples)
    assert not torch.allclose(drawn["auto"], drawn["standard_normal"])


@pytest.mark.parametrize("mean, expected", [(None, 0.0), (0.7, 0.7 * 0.1**0.5)])
def test_the_mean_start_has_the_mean_of_the_true_x_t(mean, expected):
    """With abar_T = 0.1 the true x_T still holds sqrt(0.1) of the data's mean; N(0, I) lacks it."""
    schedule = Schedule(torch.tensor([0.5, 0.8], dtype=torch.float64))
    data_mean = None if mean is None else torch.full((1, 1, 1), mean)
    x = start_samples(schedule, 0, range(4000), (1, 1, 1), CPU, data_mean)
    # Four standard errors of 4000 numbers of variance one or less.
    assert float(x.mean()) == pytest.approx(expected, abs=4 / math.sqrt(4000))


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_output(pipe):
    steps = []
    out = pipe(num_samples=5, batch_size=2, on_step=steps.append)
    assert out.samples.shape == (5, *SHAPE) and out.samples.dtype == torch.float32
    assert out.samples.abs().max() <= 1 and out.nonfinite.shape == (5,) and out.seconds > 0
    assert [(image.size, image.mode) for image in out.images] == [((TINY_SIZE, TINY_SIZE), "RGB")] * 5
    assert len(steps) == 3 * TINY_STEPS
    assert np.diff([0, *steps]).tolist() == [2] * 2 * TINY_STEPS + [1] * TINY_STEPS  # samples advanced by a step
    levels = ((out.samples[1] + 1) * 127.5).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(out.images[1]), levels.numpy().astype(np.uint8))


def test_grey_images(tmp_path):
    out = draw(GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path, channels=1)), 2)
    assert out.samples.shape == (2, 1, TINY_SIZE, TINY_SIZE)
    assert [image.mode for image in out.images] == ["L", "L"]


def test_the_contracts_ten_lines(folder):
    pipe = GuidedDDPMPipeline.from_pretrained(str(folder)).to("cpu")
    guidance = ClassifierGuidance(SmoothCNN(3), target=0, scale=10.0, input="pred_x0", stabilizer=EMA(0.99))
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_samples=3, batch_size=2, seed=0, guidance=guidance)
    assert len(out.images) == 3 and out.samples.shape == (3, *SHAPE)


def test_guidance_raises_the_targets_probability_through_a_u_net(pipe):
    classifier = SmoothCNN(3)
    means = []
    for scale in (0.0, 2.0, 10.0):
        guidance = ClassifierGuidance(classifier, 2, scale=scale, clip_pred_x0=False)
        means.append(float(log_prob(classifier, draw(pipe, 8, guidance=guidance).samples, 2).mean()))
    assert means == sorted(means) and means[-1] > means[0] + 0.05


def test_half_precision_keeps_the_state_in_float32(pipe):
    guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=2.0, stabilizer=EMA(0.5))
    exact = draw(pipe, 3, guidance=guidance).samples
    half = draw(pipe, 3, guidance=guidance, precision=torch.bfloat16).samples
    assert half.dtype == torch.float32
    # bfloat16 has three digits: an error of 0.004 in eps, amplified by 1 / sqrt(abar_T) = 14 at most.
    assert float((half - exact).abs().mean()) < 0.02
    assert not torch.equal(half, exact)


def test_round_trip(folder, tmp_path, pipe):
    samples = draw(pipe, seed=1).samples
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(GuidedDDPMPipeline.from_pretrained(tmp_path), seed=1).samples, samples)
    for place in (folder, tmp_path):
        theirs = DDPMPipeline.from_pretrained(place)
        assert type(theirs.scheduler) is DDPMScheduler
        assert theirs.unet.config.sample_size == TINY_SIZE


def test_sampling_trains_nothing(pipe):
    expected = draw(pipe, 1, guidance=ClassifierGuidance(SmoothCNN(3), 0)).samples
    pipe.unet.train().requires_grad_(True)
    assert torch.equal(draw(pipe, 1, guidance=ClassifierGuidance(SmoothCNN(3), 0)).samples, expected)
    assert pipe.unet.training and all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    pipe.unet.eval()


def test_numbers_of_any_integer_type_and_precision_by_name(pipe):
    expected = draw(pipe, 2).samples
    found = draw(pipe, np.int64(2), batch_size=np.int32(2), precision="float32").samples
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="precision: 'half' is unknown; allowed: a dtype or auto, float32, "):
        draw(pipe, 1, precision="half")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_unet_of_another_floating_type_samples_in_float32(tmp_path, dtype):
    """Tolerance: its own rounding, over the few steps of a toy."""
    folder = write_tiny_pipeline(tmp_path)
    guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=2.0)
    exact = draw(GuidedDDPMPipeline.from_pretrained(folder), 2, guidance=guidance).samples
    pipe = GuidedDDPMPipeline.from_pretrained(folder, torch_dtype=dtype)
    found = draw(pipe, 2, guidance=guidance).samples
    assert found.dtype == torch.float32 and pipe.unet.dtype == dtype
    assert float((found - exact).abs().mean()) < 0.05


def test_samples_that_are_no_pictures_are_given_all_the_same(tmp_path):
    from diffusers import DDPMScheduler, UNet2DModel

    settings = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, 5, 5, layers_per_block=1, norm_num_groups=4, **settings)
    out = draw(GuidedDDPMPipeline(unet, DDPMScheduler(num_train_timesteps=3)), 2)
    assert out.samples.shape == (2, 5, 8, 8) and out.images == []


def test_a_class_conditional_unet_is_refused_by_name(pipe):
    from diffusers import UNet2DModel

    settings = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, 3, 3, layers_per_block=1, norm_num_groups=4, num_class_embeds=4, **settings)
    with pytest.raises(ValueError, match="the U-Net is conditional on a class"):
        draw(GuidedDDPMPipeline(unet, pipe.scheduler), 1)


@pytest.mark.parametrize(
    "mean, words",
    [
        (torch.zeros(3, 4, 4), r"data_mean: has the shape \(3, 4, 4\), the model's images \(3, 8, 8\)"),
        (torch.full((3, 8, 8), 127.0), r"data_mean: holds values outside \[-1, 1\]; is it in 0..255"),
    ],
)
def test_a_mean_image_that_is_none_is_refused(tmp_path, mean, words):
    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path))
    pipe.data_mean = mean
    with pytest.raises(ValueError, match=words):
        draw(pipe, 1, start="data_mean")


def test_a_trace_of_no_guided_step_is_empty(pipe):
    """DDPM's last step, here the only one, adds no noise and takes no guidance."""
    out = draw(pipe, 2, guidance=ClassifierGuidance(SmoothCNN(3), 1), num_inference_steps=1, trace=True)
    assert out.trace.t.shape == (0,) and out.trace.grad_norm.shape == (2, 0)


def test_no_gradient_is_taken_where_the_scale_is_zero(pipe):
    calls = []

    class Counting(SmoothCNN):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    steps = len(pipe.scheduler.betas)
    low = (steps // 2) / steps
    draw(pipe, 1, guidance=ClassifierGuidance(Counting(3), 1, scale=Interval(2.0, low, 1.0)))
    assert len(calls) == 1 + steps - steps // 2 + 1  # the trial, and t = steps // 2 .. steps


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_samples": 0}, "num_samples: 0 is no whole number >= 1"),
        ({"batch_size": 0}, "batch_size: 0 is no whole number >= 1"),
        ({"first_sample": -1}, "first_sample: -1 is no whole number >= 0"),
        ({"batch_size": "many"}, "batch_size: 'many' is no whole number >= 1"),
        ({"trace": True}, "trace: needs guidance"),
        ({"start": "zero"}, "start: 'zero' is unknown; allowed: auto, standard_normal, data_mean"),
        ({"start": "data_mean"}, "start: data_mean needs the file data_mean.npy"),
        ({"guidance": ClassifierGuidance(SmoothCNN(3), 3)}, "target: 3 is no class of the classifier, which has 3"),
        ({"guidance": ClassifierGuidance(SmoothCNN(3, channels=1), 0)}, "cannot take images of shape (3, 8, 8)"),
    ],
)
def test_wrong_settings_are_refused_before_any_step(pipe, settings, message):
    steps = []
    with pytest.raises(ValueError) as error:
        pipe(**{"on_step": steps.append} | settings)
    assert message in str(error.value) and not steps


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            DDPMScheduler(variance_type="learned"),
            "variance_type 'learned' is not supported; allowed: fixed",
        ),
        (
            DDPMScheduler(variance_type="learned_range"),
            "variance learned_range needs a U-Net with twice",
        ),
        (DDPMScheduler(thresholding=True), "thresholding True is not supported; allowed: False"),
        (DDPMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True is not supported; allowed: False"),
        (DDPMScheduler(clip_sample_range=2.0), "clip_sample_range 2.0 is not supported; allowed: 1.0"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "algorithm_type 'sde-dpmsolver++' is not supp"),
        (PNDMScheduler(), "scheduler PNDMScheduler is not supported; allowed: DDPMScheduler, DDIMScheduler, DPMSolver"),
    ],
)
def test_schedulers_of_other_mathematics_are_refused(pipe, scheduler, message):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError) as error:
        draw(pipe)
    assert message in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model_index.json", remove),
        ("model_index.json", cut),
        ("model_index.json", empty),
        ("unet/diffusion_pytorch_model.safetensors", cut),
        ("unet/diffusion_pytorch_model.safetensors", empty),
        ("unet/diffusion_pytorch_model.safetensors", remove),
        ("unet/config.json", cut),
        ("unet/config.json", remove),
        ("scheduler/scheduler_config.json", cut),
        ("scheduler/scheduler_config.json", remove),
        (DATA_MEAN_FILE, cut),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(folder_with_mean, name, damage):
    damage(folder_with_mean / name)
    with pytest.raises(DataError) as error:
        GuidedDDPMPipeline.from_pretrained(folder_with_mean)
    message = str(error.value)
    assert str(folder_with_mean) in message and "\n" not in message
    assert error.value.path is not None  # the command line knows what to do about it


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        GuidedDDPMPipeline.from_pretrained(str(tmp_path / "missing"))
