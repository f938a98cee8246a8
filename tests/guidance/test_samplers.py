"""The samplers' steps against diffusers' own, and against distributions that are known exactly."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from toys import TwoGaussians, vp_schedule

from nrcg import ClassifierGuidance
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import Prediction, to_eps
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import GuidedStep
from nrcg.guidance.samplers import DDIM, DDPM, DPMSolverPP
from nrcg.guidance.sampling import guided_sample, start_samples

STEPS = 50
BETAS = {"num_train_timesteps": STEPS, "beta_start": 1e-3, "beta_end": 0.2, "beta_schedule": "linear"}
CPU = torch.device("cpu")
# float32 against float32, with the schedule's square roots taken in float64 here and in float32 there.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def wavy(x: torch.Tensor, t: int) -> torch.Tensor:
    """A noise predictor that depends on x and t."""
    return torch.sin(2.0 * x + 0.1 * t)


def ours(sampler, timesteps, x, seed=0, predict=wavy):
    return guided_sample(x, predict, sampler, timesteps, seed=seed, samples=range(len(x)))[0]


def theirs(monkeypatch, scheduler, timesteps, x, seed=0, model=wavy, module=None):
    """The same chain by diffusers' scheduler, fed with our noise."""
    state = {"t": 0}
    if module is not None:
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor",
            lambda shape, **_: sample_noise(seed, range(shape[0]), state["t"], shape[1:]),
        )
    for t in timesteps:
        state["t"] = t
        x = scheduler.step(model(x, t), t - 1, x).prev_sample
    return x


@pytest.fixture
def x():
    return sample_noise(1, range(4), 0, (3, 4, 4))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [STEPS, 10])
def test_ddpm_equals_diffusers(monkeypatch, x, clip, variance, num_steps):
    scheduler = DDPMScheduler(**BETAS, clip_sample=clip, variance_type=variance)
    scheduler.set_timesteps(num_steps)
    timesteps = [int(t) + 1 for t in scheduler.timesteps]
    expected = theirs(monkeypatch, scheduler, timesteps, x, module="scheduling_ddpm")
    found = ours(DDPM(Schedule.from_scheduler(scheduler), clip, variance), timesteps, x)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_learned_variance_equals_diffusers(monkeypatch, x):
    scheduler = DDPMScheduler(**BETAS, variance_type="learned_range")
    timesteps = list(range(STEPS, 0, -1))

    def both(x, t):
        return torch.cat([wavy(x, t), torch.cos(x)], dim=1)  # the second half says where the variance lies, in [-1, 1]

    expected = theirs(monkeypatch, scheduler, timesteps, x, model=both, module="scheduling_ddpm")
    sampler = DDPM(Schedule.from_scheduler(scheduler), True, "learned_range")
    found = ours(sampler, timesteps, x, predict=lambda x, t: Prediction(wavy(x, t), (torch.cos(x) + 1) / 2))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_steps", [STEPS, 10])
def test_ddim_equals_diffusers(monkeypatch, x, clip, num_steps):
    scheduler = DDIMScheduler(**BETAS, clip_sample=clip)
    scheduler.set_timesteps(num_steps)
    timesteps = [int(t) + 1 for t in scheduler.timesteps]
    expected = theirs(monkeypatch, scheduler, timesteps, x)
    found = ours(DDIM(Schedule.from_scheduler(scheduler), clip), timesteps, x)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_ddim_with_full_noise_is_ancestral_sampling(x):
    """Song et al. 2021: eta = 1 gives the DDPM with the posterior's variance."""
    schedule = Schedule.linear(STEPS, 1e-3, 0.2)
    timesteps = range(STEPS, 0, -1)
    found = ours(DDIM(schedule, False, eta=1.0), timesteps, x)
    torch.testing.assert_close(found, ours(DDPM(schedule, False), timesteps, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [20, 8])
def test_dpm_solver_equals_diffusers(monkeypatch, x, num_steps):
    scheduler = DPMSolverMultistepScheduler(**BETAS, lower_order_final=True)
    scheduler.set_timesteps(num_steps)
    timesteps = [int(t) + 1 for t in scheduler.timesteps]
    expected = theirs(monkeypatch, scheduler, timesteps, x)
    found = ours(DPMSolverPP(Schedule.from_scheduler(scheduler), False), timesteps, x)
    torch.testing.assert_close(found, expected, **TOLERANCE)


# --- guidance ----------------------------------------------------------------------------------------------------


class ExactGuide(ClassifierGuidance):
    """The exact gradient of log p(class 1 | x_t) for `TwoGaussians`."""

    def __init__(self, data: TwoGaussians, scale: float = 1.0):
        super().__init__(torch.nn.Identity(), 1, scale)
        self.data = data

    def gradient(self, x_t, t, predict_noise, schedule):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(torch.nn.functional.logsigmoid(self.data.logit(x, t)).sum(), x)
        return GuidedStep(grad, Prediction(predict_noise(x_t, t)), torch.zeros(len(x_t), 2))


SAMPLERS = {
    "ddpm": lambda schedule: DDPM(schedule, False),
    "ddpm fixed_large": lambda schedule: DDPM(schedule, False, "fixed_large"),
    "ddim": lambda schedule: DDIM(schedule, False),
    "ddim eta 0.5": lambda schedule: DDIM(schedule, False, 0.5),
    "dpm++": lambda schedule: DPMSolverPP(schedule, False),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [50, 200])
def test_exact_guidance_at_scale_one_gives_the_conditional_distribution(name, num_steps):
    """A class of a mixture of two Gaussians: its mean and spread, within errors that shrink with the steps."""
    schedule = vp_schedule(num_steps)
    data = TwoGaussians(schedule, 0.6, 0.2)
    samples = range(4000)
    x = start_samples(schedule, 3, samples, (1, 1, 1), CPU)
    x, nonfinite = guided_sample(
        x,
        data.predict_noise,
        SAMPLERS[name](schedule),
        range(num_steps, 0, -1),
        seed=3,
        samples=samples,
        guidance=ExactGuide(data),
    )
    assert not nonfinite.any()
    mean, std = data.centre, data.std
    # 4 / T for the discretisation, and three standard errors of 4000 samples.
    tolerance = 4 / num_steps + 3 * std / math.sqrt(len(samples))
    assert float(x.mean()) == pytest.approx(mean, abs=tolerance)
    assert float(x.std()) == pytest.approx(std, abs=tolerance)


class LinearLogProb(torch.nn.Module):
    """One logit w x - 50: log p(class 1 | x) = log sigmoid of it is w x - 50, to e^-40 of itself."""

    def __init__(self, w: float):
        super().__init__()
        self.w = w

    def forward(self, x):
        return self.w * x.flatten(1) - 50.0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [50, 200])
def test_guidance_through_the_denoised_image_is_exact_for_a_gaussian(name, num_steps):
    """Data N(0, std^2), log p(y | x_0) = w x_0 + const: p(x_0 | y) is N(w std^2, std^2). x0hat is E[x_0 | x_t] and the
    posterior's variance does not depend on x_t, so grad log p(y | x_t) = w dx0hat/dx_t: eq. 6 is exact."""
    schedule = vp_schedule(num_steps)
    data = TwoGaussians(schedule, 0.0, 0.4)
    samples, w = range(4000), 2.5
    guidance = ClassifierGuidance(LinearLogProb(w), 1, scale=1.0, clip_pred_x0=False)
    x, _ = guided_sample(
        start_samples(schedule, 3, samples, (1, 1, 1), CPU),
        data.predict_noise,
        SAMPLERS[name](schedule),
        range(num_steps, 0, -1),
        seed=3,
        samples=samples,
        guidance=guidance,
    )
    # 7 / T for the discretisation (the posterior's variance lags behind beta_t), and three standard errors.
    tolerance = 7 / num_steps + 3 * data.std / math.sqrt(len(samples))
    assert float(x.mean()) == pytest.approx(w * data.std**2, abs=tolerance)
    assert float(x.std()) == pytest.approx(data.std, abs=tolerance)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_saturated_pixel_is_moved_along_the_gradient(clip, eta):
    """The shift of DDIM by hand, whether x0hat is clipped or not: sqrt(abar') (1 - abar) / sqrt(abar) in x0hat, and
    -sqrt(1 - abar' - std^2) sqrt(1 - abar) in the direction. Clipped after the guidance, the first would be lost. The
    noise prediction is that of the clipped x0hat, as diffusers has it with use_clipped_model_output."""
    schedule, t, t_prev = vp_schedule(50), 30, 25
    sampler = DDIM(schedule, clip, eta)
    abar, abar_prev = float(schedule.abar[t]), float(schedule.abar[t_prev])
    x = torch.full((1, 1, 2, 2), 3.0 * abar**0.5)  # x0hat = 3 where the noise prediction is 0
    shift = torch.tensor([-1.0, -0.1, 0.1, 1.0]).reshape(1, 1, 2, 2)
    noise = torch.zeros_like(x)
    still = torch.zeros_like(shift)
    plain, guided = (sampler.step(x, t, t_prev, Prediction(torch.zeros_like(x)), s, noise) for s in (still, shift))
    variance = eta**2 * schedule.posterior(t, t_prev)[2]
    x0 = 1.0 if clip else 3.0
    eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
    torch.testing.assert_close(plain, abar_prev**0.5 * x0 + (1 - abar_prev - variance) ** 0.5 * eps)
    factor = abar_prev**0.5 * (1 - abar) / abar**0.5 - (1 - abar_prev - variance) ** 0.5 * (1 - abar) ** 0.5
    assert factor > 0
    torch.testing.assert_close(guided - plain, factor * shift, rtol=1e-4, atol=1e-6)


def test_multistep_state_starts_anew():
    schedule = Schedule.linear(STEPS, 1e-3, 0.2)
    sampler, x = DPMSolverPP(schedule, False), sample_noise(0, range(2), 0, (1, 2, 2))
    assert torch.equal(ours(sampler, range(STEPS, 0, -5), x), ours(sampler, range(STEPS, 0, -5), x))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_says_the_same_noise(kind):
    schedule = Schedule.linear(STEPS, 1e-3, 0.2)
    x0, eps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    for t in (1, 20, STEPS):
        abar = float(schedule.abar[t])
        x_t = schedule.q_sample(x0, t, eps)
        output = {"epsilon": eps, "sample": x0, "v_prediction": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0}[kind]
        # float32: at t = 1 the noise is 30 times smaller than the picture it is taken from.
        torch.testing.assert_close(to_eps(output, x_t, t, schedule, kind), eps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: DDPM(s, True, "learned"), "variance 'learned' is not supported; allowed: fixed_small"),
        (lambda s: DDIM(s, True, 1.5), "eta: 1.5 is not in [0, 1]"),
        (
            lambda s: to_eps(torch.zeros(1, 1), torch.zeros(1, 1), 1, s, "flow"),
            "prediction_type 'flow' is not",
        ),
    ],
)
def test_what_is_not_supported_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make(Schedule.linear(STEPS, 1e-3, 0.2))
    assert message in str(error.value)
