"""Noise levels in the frame of the variance-preserving process: how each is put to the network, how its answer is read.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, whatever frame a scheduler keeps: x = alpha x_0 + sigma eps is
sqrt(alpha^2 + sigma^2) times that, with abar = alpha^2 / (alpha^2 + sigma^2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nrcg.diffusion.objectives import Prediction, to_eps, to_x0
from nrcg.diffusion.schedule import Schedule

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
    """The levels that a scheduler of diffusers steps through, N..1 by their order, and the steps between them.

    Args:
        scheduler: Of diffusers.
        num_steps: Of the sampling.

    Attributes:
        schedule: abar of the levels.

    Raises:
        ValueError: A network that predicts something else, or two levels the same for a multistep solver.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    """What the scheduler is told otherwise, so that it steps from x0hat."""
    multistep = False
    """Whether the scheduler divides by the difference of two levels."""

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
        self.read(torch.zeros(1, 1), torch.zeros(1, 1), 1)  # an unknown kind of prediction is refused here
        if self.multistep and bool((self.sigmas.diff() >= 0).any()):
            raise ValueError(
                f"num_inference_steps: of {num_steps} steps UniPC's scheduler makes two the same; take fewer"
            )

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
        return self.told(output[:, : x.shape[1]], x, t)  # a learned variance behind it is of no use to these steps

    def told(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        """What an output shaped like x says of it."""
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
        # x0hat is clipped before the guidance, not after.
        plain = {"clip_sample": False} if "clip_sample" in self._scheduler.config else {}
        scheduler = type(self._scheduler).from_config(self._scheduler.config, **self.settings, **plain)
        scheduler.set_timesteps(self._num_steps)
        scheduler.set_begin_index(self.place(t))
        scheduler.is_scale_input_called = True  # the network is asked elsewhere
        return scheduler


class SigmaLevels(Levels):
    """Of Euler's and Heun's steps for networks of betas (Karras et al. 2022, algorithm 2 without churn)."""

    settings = FROM_X0


class VPLevels(SigmaLevels):
    """Of UniPC (Zhao et al. 2023), whose x is ours."""

    multistep = True

    def framed(self, size: Tensor) -> Tensor:
        return torch.ones_like(size)


class EDMLevels(Levels):
    """Of Euler's steps for preconditioned networks (Karras et al. 2022, table 1)."""

    def ask(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return self._scheduler.precondition_inputs(self.native(x, t), self.sigma(t)), super().ask(x, t)[1]

    def told(self, output: Tensor, x: Tensor, t: int) -> Prediction:
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

    def told(self, output: Tensor, x: Tensor, t: int) -> Prediction:
        native, s = self.native(x, t), self.sigma(t)
        return Prediction(native + (1.0 - s) * output, x0=native - s * output)

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        return (native - x0) / self.sigma(t)


class FlowVPLevels(FlowLevels):
    """Of UniPC for flow matching."""

    settings = FROM_X0
    multistep = True

    def answer(self, x0: Tensor, native: Tensor, t: int) -> Tensor:
        return x0
