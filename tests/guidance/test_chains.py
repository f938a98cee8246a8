"""Schedulers of diffusers under guidance: step for step as diffusers has them, and exact where the data are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from toys import TwoGaussians

from nrcg import ClassifierGuidance
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import Prediction
from nrcg.guidance.chains import SUPPORTED, chain_of, scheduler_for
from nrcg.guidance.guidance import GuidedStep
from nrcg.guidance.sampling import guided_sample, start_samples

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CASES = {
    "euler": (EulerDiscreteScheduler, BETAS),
    "euler v leading": (
        EulerDiscreteScheduler,
        BETAS | {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
    ),
    "euler x0 trailing": (
        EulerDiscreteScheduler,
        BETAS | {"prediction_type": "sample", "timestep_spacing": "trailing"},
    ),
    "euler karras": (EulerDiscreteScheduler, BETAS | {"use_karras_sigmas": True}),
    "euler to sigma_min": (EulerDiscreteScheduler, BETAS | {"final_sigmas_type": "sigma_min"}),
    "heun": (HeunDiscreteScheduler, BETAS),
    "heun v": (HeunDiscreteScheduler, BETAS | {"prediction_type": "v_prediction"}),
    "unipc": (UniPCMultistepScheduler, BETAS),
    "unipc v order 3": (UniPCMultistepScheduler, BETAS | {"prediction_type": "v_prediction", "solver_order": 3}),
    "unipc flow": (UniPCMultistepScheduler, BETAS | FLOW),
    "edm": (EDMEulerScheduler, {}),
    "edm v": (EDMEulerScheduler, {"prediction_type": "v_prediction", "sigma_data": 1.0}),
    "flow": (FlowMatchEulerDiscreteScheduler, {}),
    "flow shift 3": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


def made(name):
    kind, settings = CASES[name]
    return kind(**settings)


def wavy(x, time):
    """A network of input and timestep."""
    return 0.5 * torch.sin(2.0 * x + 0.003 * float(time)) + 0.1 * x


def through(network, answer):
    """A noise predictor that asks and reads as the chain says."""

    def predict(x, t):
        given, times = network.ask(x, t)
        return network.read(answer(given, times[0]), x, t)

    return predict


@pytest.mark.parametrize("num_steps", [7, 20])
@pytest.mark.parametrize("name", CASES)
def test_without_guidance_each_step_is_diffusers_own(name, num_steps):
    """float32 in a frame of another size, after up to 39 steps."""
    scheduler, chain = made(name), chain_of(made(name), num_steps)
    scheduler.set_timesteps(num_steps)
    noise = sample_noise(1, range(3), 0, (3, 4, 4))
    theirs, ours = noise * getattr(scheduler, "init_noise_sigma", 1.0), noise * chain.start_scale
    predict = through(chain.network, wavy)
    assert len(chain.timesteps) == len(scheduler.timesteps)
    for time, t in zip(scheduler.timesteps, chain.timesteps, strict=True):
        given = scheduler.scale_model_input(theirs, time) if hasattr(scheduler, "scale_model_input") else theirs
        theirs = scheduler.step(wavy(given, time), time, theirs).prev_sample
        with torch.no_grad():
            ours = chain.sampler.step(ours, t, t - 1, predict(ours, t), None, None)
        native = ours * chain.network.size(t - 1)
        torch.testing.assert_close(native, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


def test_the_last_step_of_stable_diffusions_ddim_is_diffusers_own():
    """set_alpha_to_one = False: it reaches x_1."""
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    chain, x = chain_of(scheduler, 10), sample_noise(1, range(2), 0, (3, 4, 4))
    found, _ = guided_sample(
        x, through(chain.network, wavy), chain.sampler, chain.timesteps, seed=0, samples=range(len(x))
    )
    for time in scheduler.timesteps:
        x = scheduler.step(wavy(x, time), time, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


# --- known data ------------------------------------------------------------------------------------------------------


class Perfect:
    """The network of a scheduler that knows a mixture of N(+-centre, std^2): what it would learn to say."""

    def __init__(self, scheduler, centre, std):
        self.scheduler, self.centre, self.std = scheduler, centre, std
        self.name, self.kind = type(scheduler).__name__, scheduler.config.get("prediction_type")

    def __call__(self, given, time):
        alpha, sigma, x, sigma_data = self.frame(given, float(time))
        x0 = self.posterior_mean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        if self.name == "EDMEulerScheduler":
            out = sigma * sigma_data / math.hypot(sigma, sigma_data) * (-1 if self.kind == "v_prediction" else 1)
            return (x0 - sigma_data**2 / (sigma**2 + sigma_data**2) * x) / out
        if self.name.startswith("Flow") or self.kind == "flow_prediction":
            return eps - x0
        share = 1 / math.hypot(1.0, sigma / alpha)  # sqrt(abar)
        return {"sample": x0, "epsilon": eps, "v_prediction": share * eps - math.sqrt(1 - share**2) * x0}[self.kind]

    def frame(self, given, time):
        """alpha, sigma, x with x = alpha x_0 + sigma eps, from what the network is given."""
        if self.name == "EDMEulerScheduler":
            sigma, data = math.exp(4 * time), self.scheduler.config.sigma_data
            return 1.0, sigma, given * math.hypot(sigma, data), data
        if self.name.startswith("Flow") or self.kind == "flow_prediction":
            return 1 - time / 1000, time / 1000, given, None
        abar = self.scheduler.alphas_cumprod.double().numpy()
        ratio = np.interp(time, np.arange(len(abar)), np.sqrt((1 - abar) / abar))
        share = 1 / math.hypot(1.0, ratio)
        return share, math.sqrt(1 - share**2), given, None

    def posterior_mean(self, x, alpha, sigma):
        """E[x_0 | x] by the weights of the two Gaussians."""
        variance = alpha**2 * self.std**2 + sigma**2
        which = torch.sigmoid(2 * alpha * self.centre * x / variance)
        means = [(self.std**2 * alpha * x + sigma**2 * centre) / variance for centre in (self.centre, -self.centre)]
        return which * means[0] + (1 - which) * means[1]


class ExactGuide(ClassifierGuidance):
    """The exact gradient of log p(class 1 | x_t) for `TwoGaussians`."""

    def __init__(self, data):
        super().__init__(torch.nn.Identity(), 1, 1.0)
        self.data = data

    def gradient(self, x_t, t, predict_noise, schedule):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(torch.nn.functional.logsigmoid(self.data.logit(x, t)).sum(), x)
        with torch.no_grad():
            return GuidedStep(grad, predict_noise(x_t, t), torch.zeros(len(x_t), 2))


EXACT = [name for name in CASES if name not in ("euler karras", "euler to sigma_min")]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("num_steps", [40, 160])
def test_exact_guidance_gives_the_conditional_distribution(name, num_steps):
    """A class of a mixture of two Gaussians: its mean and spread, within errors that shrink with the steps."""
    scheduler = made(name)
    chain = chain_of(scheduler, num_steps)
    centre, std, samples = 0.6, 0.2, range(4000)
    data = TwoGaussians(chain.schedule, centre, std)
    start = chain.start_scale * start_samples(chain.schedule, 3, samples, (1, 1, 1), torch.device("cpu"))
    x, nonfinite = guided_sample(
        start,
        through(chain.network, Perfect(scheduler, centre, std)),
        chain.sampler,
        chain.timesteps,
        seed=3,
        samples=samples,
        guidance=ExactGuide(data),
    )
    assert not nonfinite.any()
    tolerance = 4 / num_steps + 3 * std / math.sqrt(len(samples))
    assert float(x.mean()) == pytest.approx(centre, abs=tolerance)
    assert float(x.std()) == pytest.approx(std, abs=tolerance)


class LinearLogProb(torch.nn.Module):
    """One logit w x - 50: log p(class 1 | x) = log sigmoid of it is w x - 50, to e^-40 of itself."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        return self.w * x.flatten(1) - 50.0


@pytest.mark.parametrize("name", EXACT)
def test_guidance_through_the_denoised_image_is_exact_for_a_gaussian(name):
    """Data N(0, std^2), log p(y | x_0) = w x_0 + const: p(x_0 | y) is N(w std^2, std^2); eq. 6 is exact there."""
    scheduler, num_steps, std, w, samples = made(name), 160, 0.4, 2.5, range(4000)
    chain = chain_of(scheduler, num_steps)
    x, _ = guided_sample(
        chain.start_scale * start_samples(chain.schedule, 3, samples, (1, 1, 1), torch.device("cpu")),
        through(chain.network, Perfect(scheduler, 0.0, std)),
        chain.sampler,
        chain.timesteps,
        seed=3,
        samples=samples,
        guidance=ClassifierGuidance(LinearLogProb(w), 1, scale=1.0, clip_pred_x0=False),
    )
    tolerance = 7 / num_steps + 3 * std / math.sqrt(len(samples))
    assert float(x.mean()) == pytest.approx(w * std**2, abs=tolerance)
    assert float(x.std()) == pytest.approx(std, abs=tolerance)


def test_where_the_image_is_lost_nothing_guides():
    """Flow matching begins at noise alone, abar = 0: a shift of x0hat would be infinite."""
    chain = chain_of(FlowMatchEulerDiscreteScheduler(), 5)
    assert float(chain.schedule.abar[5]) == 0.0
    asked = []

    class Watched(ClassifierGuidance):
        def gradient(self, x_t, t, predict_noise, schedule):
            asked.append(t)
            return super().gradient(x_t, t, predict_noise, schedule)

    _, nonfinite = guided_sample(
        sample_noise(1, range(2), 0, (1, 2, 2)),
        through(chain.network, wavy),
        chain.sampler,
        chain.timesteps,
        seed=0,
        samples=range(2),
        guidance=Watched(lambda x: x.flatten(1), 0, 0.1),
    )
    assert asked == [4, 3, 2, 1] and not nonfinite.any()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, num_steps, message",
    [
        (lambda: PNDMScheduler(), 10, "scheduler PNDMScheduler is not supported; allowed: DDPMScheduler"),
        (lambda: LCMScheduler(), 10, "scheduler LCMScheduler is not supported"),
        (
            lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            10,
            "scheduler stochastic_sampling True is not supported; allowed: False",
        ),
        (lambda: UniPCMultistepScheduler(predict_x0=False), 10, "scheduler predict_x0 False is not supported"),
        (
            lambda: UniPCMultistepScheduler(use_flow_sigmas=True),
            10,
            "use_flow_sigmas needs prediction_type flow_prediction",
        ),
        (lambda: EulerDiscreteScheduler(prediction_type="flow"), 10, "prediction_type 'flow' is not supported"),
        (lambda: EDMEulerScheduler(prediction_type="sample"), 10, "Prediction type sample is not supported"),
        (lambda: DDPMScheduler(), 1001, "num_inference_steps: 1001 is not in 1..1000"),
        (
            lambda: UniPCMultistepScheduler(num_train_timesteps=50),
            50,
            "num_inference_steps: of 50 steps UniPC's scheduler makes two the same; take fewer",
        ),
        (lambda: EulerDiscreteScheduler(), 0, "num_inference_steps: 0 is not in 1..1000"),
    ],
)
def test_what_is_not_supported_is_refused(make, num_steps, message):
    with pytest.raises(ValueError) as error:
        chain_of(make(), num_steps)
    assert message in str(error.value)


def test_an_eta_is_for_ddim():
    with pytest.raises(ValueError, match="is for a DDIMScheduler; the pipeline has a EulerDiscreteScheduler"):
        chain_of(EulerDiscreteScheduler(), 10, eta=0.5)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
def test_a_sampler_of_betas_is_refused_where_there_are_none(scheduler):
    with pytest.raises(ValueError, match="sampler: 'ddim' is for models of betas; this one's scheduler is"):
        scheduler_for("ddim", scheduler)
    assert scheduler_for("model", scheduler) is scheduler


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "euler", "heun", "unipc"])
def test_every_sampler_of_betas_keeps_them(sampler):
    scheduler = scheduler_for(sampler, DDPMScheduler(**BETAS, prediction_type="v_prediction"))
    assert type(scheduler).__name__ in SUPPORTED
    assert scheduler.config["prediction_type"] == "v_prediction"
    torch.testing.assert_close(scheduler.betas, DDPMScheduler(**BETAS).betas)
    assert chain_of(scheduler, 10).timesteps[0] in (10, 19, 1000)  # ten levels, Heun's two a step, or T


def test_half_of_a_step_of_two_is_refused():
    chain = chain_of(HeunDiscreteScheduler(), 5)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot begin below its first step"):
        chain.sampler.step(x, chain.timesteps[1], chain.timesteps[2], Prediction(x, x0=x), None, None)
