"""Schedulers of diffusers: the noise levels they step through, and their rule, with a place for the guidance.

A trajectory lives in the frame of the variance-preserving process whatever frame its scheduler keeps (`levels`), so
that one guidance serves them all: DDPM, Euler's steps in sigma (Karras et al. 2022, alpha = 1), flow matching (Lipman
et al. 2023, alpha = 1 - sigma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from nrcg.diffusion.objectives import Prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.levels import EDMLevels, FlowLevels, FlowVPLevels, Levels, Network, SigmaLevels, Trained, VPLevels
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
    "EulerDiscreteScheduler": {"interpolation_type": ("linear",)},  # log-linear has a level too many
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

    def below(self, first: int) -> list[int]:
        """The timesteps from one of at most `first` on, at which a step begins."""
        rest = [t for t in self.timesteps if t <= first]
        while rest and isinstance(self.network, Levels) and not self.network.begins_at(rest[0]):
            rest = rest[1:]
        return rest


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
    made = getattr(diffusers, SCHEDULERS[sampler])
    # A scheduler that does not clip is exchanged for one that does not: latents leave [-1, 1].
    changes = {} if "clip_sample" in scheduler.config else {"clip_sample": False}
    # Trailing: fewer steps start at T, where the noise is what sampling starts from.
    return made.from_config({**scheduler.config, **changes}, timestep_spacing="trailing")
