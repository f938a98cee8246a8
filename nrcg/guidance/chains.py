"""Schedulers of diffusers: the noise levels they step through, their rule, and what the network is asked at each.

A trajectory lives in the frame of the variance-preserving process, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,
whatever frame its scheduler keeps: x = alpha x_0 + sigma eps is sqrt(alpha^2 + sigma^2) times that, with abar =
alpha^2 / (alpha^2 + sigma^2). So one guidance serves them all: DDPM, Euler's steps in sigma (Karras et al. 2022, alpha
= 1) and flow matching (Lipman et al. 2023, alpha = 1 - sigma).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor

from nrcg.diffusion.objectives import Prediction, to_eps, to_x0
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.samplers import DDIM, DDPM, DPMSolverPP, Pull, Sampler

_PLAIN = {"thresholding": (False,), "rescale_betas_zero_snr": (False,)}
_RAW = {"use_flow_sigmas": (False,)}
OWN: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": _PLAIN | {"clip_sample_range": (1.0,), "variance_type": DDPM.VARIANCES},
    "DDIMScheduler": _PLAIN | {"clip_sample_range": (1.0,)},
    "DPMSolverMultistepScheduler": _PLAIN
    | _RAW
    | {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
    },
}
"""Schedulers whose steps are written here, with a place for the guidance, and the settings of them that are."""
THEIRS: dict[str, dict[str, tuple]] = {
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"clip_sample_range": (1.0,)},
    "UniPCMultistepScheduler": {"thresholding": (False,), "predict_x0": (True,), "use_dynamic_shifting": (False,)},
    "EDMEulerScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {
        "use_dynamic_shifting": (False,),
        "stochastic_sampling": (False,),
        "invert_sigmas": (False,),
    },
}
"""Schedulers that step themselves, deterministically, from the guided x0hat, and the settings that fit."""
SUPPORTED = OWN | THEIRS
"""Others are refused: a guidance that is silently left out would be worse."""
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Sampler of the configuration -> its scheduler; `model` keeps the model's own."""

FROM_X0 = MappingProxyType({"prediction_type": "sample"})


class Network(ABC):
    """How a noise level is put to the network, and how its answer is read."""

    @abstractmethod
    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """What the network is given for x_t (B, C, H, W): its input and its timesteps (B,)."""

    @abstractmethod
    def read(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        """What its output, float32, says of x_t."""


class Trained(Network):
    """The levels t = 1..T that a network was trained on, with diffusers' timestep t - 1.

    Args:
        schedule: abar_t of the training.
        prediction_type: epsilon, sample or v_prediction.

    Raises:
        ValueError: another prediction type.
    """

    def __init__(self, schedule: Schedule, prediction_type: str):
        self.schedule, self.prediction_type = schedule, prediction_type
        to_eps(torch.zeros(1, 1), torch.zeros(1, 1), 1, schedule, prediction_type)  # an unknown kind is refused here

    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), t - 1, device=x.device)

    def read(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        channels = x.shape[1]
        share = (output[:, channels:] + 1.0) / 2.0 if output.shape[1] == 2 * channels else None
        return Prediction(to_eps(output[:, :channels], x, t, self.schedule, self.prediction_type), share)


class Levels(Network):
    """The levels that a scheduler of `THEIRS` steps through, N..1 by their order, and the steps between them.

    Args:
        scheduler: Of diffusers.
        num_steps: Of the sampling.

    Attributes:
        schedule: abar of the levels.

    Raises:
        ValueError: Two levels are the same where the scheduler divides by their difference.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    """What the scheduler is told otherwise, so that it steps from x0hat."""

    def __init__(self, scheduler: Any, num_steps: int):
        self._scheduler, self._num_steps = scheduler, num_steps
        scheduler.set_timesteps(num_steps)
        self._times = scheduler.timesteps.tolist()
        self.sigmas = scheduler.sigmas.double().cpu()
        self.kind = scheduler.config.get("prediction_type")
        alpha, sigma = self.mixed(self.sigmas)
        size = (alpha.square() + sigma.square()).sqrt()
        self.schedule = Schedule.of_levels((alpha / size).square().flip(0))
        self._sizes = self.framed(size).flip(0)
        self._sizes[0] = 1.0  # what is reached last is the image as the scheduler has it

    def mixed(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the scheduler's sigmas, (N + 1,) each."""
        return torch.ones_like(sigmas), sigmas

    def framed(self, size: Tensor) -> Tensor:
        """What x is of the scheduler's own, over ours, where its alpha^2 + sigma^2 is size^2."""
        return size

    def start_scale(self) -> float:
        """Standard deviation of x at the first level, where it is noise alone."""
        return float(self._scheduler.init_noise_sigma) / self.size(self.schedule.num_steps)

    def place(self, t: int) -> int:
        """Of a level in the scheduler's tables."""
        return len(self._times) - t

    def sigma(self, t: int) -> float:
        return float(self.sigmas[self.place(t)])

    def size(self, t: int) -> float:
        """The scheduler's x over ours."""
        return float(self._sizes[t])

    def native(self, x: Tensor, t: int) -> Tensor:
        """x as the scheduler has it."""
        return x * self.size(t)

    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), self._times[self.place(t)], device=x.device)

    def read(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        eps = to_eps(output, x, t, self.schedule, self.kind)
        return Prediction(eps, x0=to_x0(output, x, t, self.schedule, self.kind))

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        """The network's output from which the scheduler would find x0."""
        return x0

    def begins_at(self, t: int) -> bool:
        """Whether a level is the first of a step, of one evaluation or two."""
        return self.place(t) % self._scheduler.order == 0

    def begin(self, t: int) -> Any:
        """A scheduler that goes from level t.

        Raises:
            ValueError: It is half of a step of two.
        """
        if not self.begins_at(t):
            raise ValueError(f"{type(self._scheduler).__name__} cannot begin below its first step; take another")
        scheduler = type(self._scheduler).from_config(self._scheduler.config, **self.settings)
        scheduler.set_timesteps(self._num_steps)
        scheduler.set_begin_index(self.place(t))
        scheduler.is_scale_input_called = True  # the network is asked elsewhere
        return scheduler


class SigmaLevels(Levels):
    """Of Euler's and Heun's steps for networks of betas (Karras et al. 2022, algorithm 2 without churn)."""

    settings = FROM_X0

    def __init__(self, scheduler: Any, num_steps: int):
        super().__init__(scheduler, num_steps)
        if "clip_sample" in scheduler.config:  # x0hat is clipped before the guidance, not after
            self.settings = {**FROM_X0, "clip_sample": False}
        self.read(torch.zeros(1, 1), torch.zeros(1, 1), 1)  # an unknown kind is refused here


class VPLevels(SigmaLevels):
    """Of UniPC (Zhao et al. 2023), whose x is ours."""

    def __init__(self, scheduler: Any, num_steps: int):
        super().__init__(scheduler, num_steps)
        check_falling(self.sigmas, num_steps)

    def framed(self, size: Tensor) -> Tensor:
        return torch.ones_like(size)


class EDMLevels(Levels):
    """Of Euler's steps for preconditioned networks (Karras et al. 2022, table 1)."""

    def __init__(self, scheduler: Any, num_steps: int):
        super().__init__(scheduler, num_steps)
        self.read(torch.zeros(1, 1), torch.zeros(1, 1), 1)

    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return self._scheduler.precondition_inputs(self.native(x, t), self.sigma(t)), super().ask(x, t)[1]

    def read(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        native = self.native(x, t)
        x0 = self._scheduler.precondition_outputs(native, output, self.sigma(t))
        return Prediction((native - x0) / self.sigma(t), x0=x0)

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        skip = float(self._scheduler.precondition_outputs(one, 0 * one, self.sigma(t)))
        out = float(self._scheduler.precondition_outputs(0 * one, one, self.sigma(t)))
        return (x0 - skip * native) / out


class FlowLevels(Levels):
    """Of flow matching, x = (1 - s) x_0 + s eps, whose network says the velocity eps - x_0 (Lipman et al. 2023)."""

    def mixed(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - sigmas, sigmas

    def start_scale(self) -> float:
        return 1.0 / self.size(self.schedule.num_steps)  # noise alone, whatever s is

    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return self.native(x, t), super().ask(x, t)[1]

    def read(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        native, s = self.native(x, t), self.sigma(t)
        return Prediction(native + (1.0 - s) * output, x0=native - s * output)

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        return (native - x0) / self.sigma(t)


class FlowVPLevels(FlowLevels):
    """Of UniPC for flow matching."""

    settings = FROM_X0

    def __init__(self, scheduler: Any, num_steps: int):
        super().__init__(scheduler, num_steps)
        check_falling(self.sigmas, num_steps)

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        return x0


def check_falling(sigmas: Tensor, num_steps: int) -> None:
    """Refuse levels whose differences a multistep solver would divide by. Raises ValueError."""
    if bool((sigmas.diff() >= 0).any()):
        raise ValueError(f"num_inference_steps: of {num_steps} steps UniPC's scheduler makes two the same; take fewer")


class Scheduled(Sampler):
    """A scheduler's own steps, from the guided x0hat (Dhariwal and Nichol 2021, algorithm 2).

    Args:
        levels: Of the scheduler.
        clip_pred_x0: As of a Sampler.
    """

    def __init__(self, levels: Levels, clip_pred_x0: bool):
        super().__init__(levels.schedule, clip_pred_x0)
        self.levels = levels
        self.reset()

    def reset(self) -> None:
        self._scheduler: Any = None
        self._guided = False

    def needs_noise(self, t_prev: int) -> bool:
        return False

    def step(
        self,
        x: Tensor,
        t: int,
        t_prev: int,
        prediction: Prediction,
        shift: Tensor | None,
        noise: Tensor | None,
        pull: Pull | None = None,
    ) -> Tensor:
        _, x0 = self.guided(x, prediction, shift, t)
        if pull is not None:
            x0 = pull(x0)
        guided = shift is not None
        # Where guidance sets in or ends, former steps are of another flow: a multistep solver begins anew.
        if self._scheduler is None or (guided != self._guided and self.levels.begins_at(t)):
            self._scheduler = self.levels.begin(t)
        self._guided = guided
        scheduler, native = self._scheduler, self.levels.native(x, t)
        time = scheduler.timesteps[self.levels.place(t)]
        new = scheduler.step(self.levels.answer(x0, native, t), time, native).prev_sample
        return new / self.levels.size(t_prev)


@dataclass(frozen=True)
class Chain:
    """How a model is sampled.

    Attributes:
        schedule: abar of the levels 1..T that the timesteps number.
        timesteps: Levels that are stepped from, falling.
        sampler: The step.
        network: How the network is asked at each.
        start_scale: Standard deviation of x at the first, where it is noise alone.
    """

    schedule: Schedule
    timesteps: list[int]
    sampler: Sampler
    network: Network
    start_scale: float = 1.0


def trained_schedule(scheduler: Any) -> Schedule:
    """abar of the training.

    Raises:
        ValueError: The scheduler knows no betas.
    """
    if getattr(scheduler, "betas", None) is None:
        raise ValueError(f"scheduler {type(scheduler).__name__} has no betas, which this needs; it can be sampled")
    return Schedule.from_scheduler(scheduler)


def check_supported(scheduler: Any, eta: float = 0.0) -> None:
    """Refuse what would be sampled otherwise than it says.

    Raises:
        ValueError: A scheduler, or a setting of it, that is not supported; an eta that it does not have.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SUPPORTED:
        raise ValueError(f"scheduler {name} is not supported; allowed: {', '.join(SUPPORTED)}")
    for key, allowed in SUPPORTED[name].items():
        if config.get(key, allowed[0]) not in allowed:  # older versions lack some keys
            raise ValueError(
                f"scheduler {key} {config[key]!r} is not supported; allowed: {', '.join(map(str, allowed))}"
            )
    if eta and name != "DDIMScheduler":
        raise ValueError(f"eta: {eta} is for a DDIMScheduler; the pipeline has a {name}")
    if config.get("use_flow_sigmas") and config.get("prediction_type") != "flow_prediction":
        raise ValueError(f"scheduler use_flow_sigmas needs prediction_type flow_prediction; it is {name}'s")


def chain_of(scheduler: Any, num_inference_steps: int | None = None, eta: float = 0.0) -> Chain:
    """How a scheduler of diffusers goes from noise to images.

    Args:
        scheduler: Its timesteps are set anew.
        num_inference_steps: 1..T; None takes all T.
        eta: For DDIM, share of the ancestral sampler's noise, in [0, 1].

    Raises:
        ValueError: See `check_supported`; or steps that are not in 1..T.
    """
    check_supported(scheduler, eta)
    name, config = type(scheduler).__name__, scheduler.config
    count = config["num_train_timesteps"]
    if num_inference_steps is not None and not 1 <= num_inference_steps <= count:
        raise ValueError(f"num_inference_steps: {num_inference_steps} is not in 1..{count}")
    clip = bool(config.get("clip_sample", False))
    if name in THEIRS:
        levels = _levels_of(scheduler)(scheduler, num_inference_steps or count)
        steps = list(range(levels.schedule.num_steps, 0, -1))
        return Chain(levels.schedule, steps, Scheduled(levels, clip), levels, levels.start_scale())
    schedule, timesteps = trained_schedule(scheduler), list(range(count, 0, -1))
    network = Trained(schedule, config["prediction_type"])
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
        # Some spacings round two steps to one.
        timesteps = list(dict.fromkeys(int(t) + 1 for t in scheduler.timesteps))
    return Chain(schedule, timesteps, _own_sampler(scheduler, schedule, clip, eta), network)


def _own_sampler(scheduler: Any, schedule: Schedule, clip: bool, eta: float) -> Sampler:
    name, config = type(scheduler).__name__, scheduler.config
    if name == "DDIMScheduler":
        if not config.get("set_alpha_to_one", True):  # the last step reaches x_1, as Stable Diffusion's does
            schedule = Schedule.of_levels(torch.cat([schedule.abar[1:2], schedule.abar[1:]]))
        return DDIM(schedule, clip, eta)
    if name == "DPMSolverMultistepScheduler":
        return DPMSolverPP(schedule, False)  # as diffusers': the solver knows no clip_sample
    return DDPM(schedule, clip, config["variance_type"])


def _levels_of(scheduler: Any) -> type[Levels]:
    name = type(scheduler).__name__
    if scheduler.config.get("use_flow_sigmas"):
        return FlowVPLevels
    return {
        "EDMEulerScheduler": EDMLevels,
        "FlowMatchEulerDiscreteScheduler": FlowLevels,
        "UniPCMultistepScheduler": VPLevels,
    }.get(name, SigmaLevels)


def scheduler_for(sampler: str, scheduler: Any) -> Any:
    """Another scheduler with the same betas.

    Args:
        sampler: A key of SCHEDULERS, or `model`, which leaves it as it is.
        scheduler: The model's.

    Raises:
        ValueError: Another name, or a model of no betas.
    """
    if sampler == "model":
        return scheduler
    if sampler not in SCHEDULERS:
        raise ValueError(f"sampler: {sampler!r} is unknown; allowed: model, {', '.join(SCHEDULERS)}")
    if getattr(scheduler, "betas", None) is None or scheduler.config.get("use_flow_sigmas"):
        own = type(scheduler).__name__
        raise ValueError(f"sampler: {sampler!r} is for models of betas; this one's scheduler is {own}: give model")
    # Trailing: fewer steps start at T, where the noise is what sampling starts from.
    made = getattr(diffusers, SCHEDULERS[sampler])
    return made.from_config(scheduler.config, timestep_spacing="trailing")
