"""The steps of the samplers: how x_t becomes the next, less noisy image, and where the guidance enters each.

Ancestral sampling shifts the mean of the transition (eq. 1 of the paper; Dhariwal and Nichol 2021, algorithm 1).
Samplers that follow the score shift the noise prediction (Dhariwal and Nichol 2021, algorithm 2). A sampler that uses
former steps is reset before each batch of trajectories.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from nrcg.diffusion.objectives import Prediction
from nrcg.diffusion.schedule import VARIANCES, Schedule

Pull = Callable[[Tensor], Tensor]
"""Moves the guided x0hat (B, C, H, W) that a step goes to: the implicit part of a guidance, such as a proximal step
towards an image. It comes last, after the gradient's shift, so that no shift can undo it."""

NOISE_ALONE = 1e-6
"""abar up to which x_t is taken for noise alone by samplers that divide by its root. A float32 network's rounding is
then a thousandth of the gradient of x0hat, which is of the order of the root."""


class Sampler(ABC):
    """A way from x_T to x_0.

    Args:
        schedule: abar_t.
        clip_pred_x0: clip x0hat to [-1, 1] wherever the step uses it.
    """

    def __init__(self, schedule: Schedule, clip_pred_x0: bool):
        self.schedule = schedule
        self.clip_pred_x0 = clip_pred_x0

    def reset(self) -> None:  # noqa: B027  (most samplers keep nothing)
        """Forget former steps."""

    @abstractmethod
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
        """One step.

        Args:
            x: x_t, (B, C, H, W).
            t: 1..T.
            t_prev: the step reached, 0 <= t_prev < t.
            shift: s * g_t, the scaled and smoothed guidance gradient; None without guidance.
            noise: standard normal like x; None where the step needs none (`needs_noise`).
            pull: moves the guided x0hat; None leaves it.
        """

    @abstractmethod
    def needs_noise(self, t_prev: int) -> bool:
        """Whether the step that reaches t_prev adds noise."""

    def takes_guidance(self, t: int, t_prev: int) -> bool:
        """Whether a shift changes the step from t to t_prev. Where x_t is noise alone nothing guides: the gradient of
        x0hat would be 0 times infinity there, and rounding alone near it."""
        return float(self.schedule.abar[t]) > NOISE_ALONE

    def pred_x0(self, x: Tensor, prediction: Prediction, t: int) -> Tensor:
        """eq. 5, clipped where asked."""
        return prediction.pred_x0(x, t, self.schedule, clip=self.clip_pred_x0)

    def guided(self, x: Tensor, prediction: Prediction, shift: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        """Dhariwal and Nichol 2021, algorithm 2: eps - sqrt(1 - abar_t) * s * g_t, and the x0hat that goes with it.

        What is clipped is the U-Net's x0hat, as in the DDPM's mean. Clipped after the guidance, a saturated pixel would
        lose its shift in x0hat and keep the one in eps, which points the other way.
        """
        eps, x0 = prediction.eps, self.pred_x0(x, prediction, t)
        if shift is None:
            return eps, x0
        abar = float(self.schedule.abar[t])
        return eps - math.sqrt(1.0 - abar) * shift, x0 + (1.0 - abar) / math.sqrt(abar) * shift


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), guided by eq. 1: mean + s * Sigma_t * g_t.

    Args:
        variance: `fixed_small` (the posterior's), `fixed_large` (beta_t) or `learned_range` (Nichol and Dhariwal 2021,
            eq. 15: the U-Net says where between the two).
    """

    VARIANCES = VARIANCES

    def __init__(self, schedule: Schedule, clip_pred_x0: bool, variance: str = "fixed_small"):
        super().__init__(schedule, clip_pred_x0)
        if variance not in self.VARIANCES:
            raise ValueError(f"variance {variance!r} is not supported; allowed: {', '.join(self.VARIANCES)}")
        self.kind = variance

    def needs_noise(self, t_prev: int) -> bool:
        return t_prev > 0

    def takes_guidance(self, t: int, t_prev: int) -> bool:
        return t_prev > 0 or self.kind != "fixed_small"  # the posterior's variance at x_0 is 0

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
        a, b, _ = self.schedule.posterior(t, t_prev)
        variance = self.variance(t, t_prev, prediction)
        x0 = self.pred_x0(x, prediction, t)
        if pull is not None:  # the shift of the mean as one of x0hat, which the mean holds a times
            x0, shift = pull(x0 if shift is None else x0 + variance / a * shift), None
        mean = a * x0 + b * x
        if shift is not None:
            mean = mean + variance * shift
        return mean if noise is None else mean + variance**0.5 * noise

    def variance(self, t: int, t_prev: int, prediction: Prediction) -> Tensor | float:
        """Sigma_t: a number, or (B, C, H, W) where it is learned."""
        small = self.schedule.posterior(t, t_prev)[2]
        if self.kind == "fixed_small":
            return small
        large = 1.0 - float(self.schedule.abar[t] / self.schedule.abar[t_prev])
        if self.kind == "fixed_large":
            return large
        if prediction.log_variance_share is None:
            raise ValueError(
                "variance learned_range needs a U-Net with twice as many output channels as input channels"
            )
        low, high = math.log(max(small, 1e-20)), math.log(large)
        return (low + prediction.log_variance_share * (high - low)).exp()


class DDIM(Sampler):
    """Song et al. 2021, eq. 12, with the guided noise prediction.

    Under guidance the noise prediction is that of the clipped x0hat, as in guided-diffusion: beside the U-Net's own the
    two would disagree about saturated pixels, and white grounds turn grey. Without guidance it is diffusers' step.

    Args:
        eta: share of the ancestral sampler's noise; 0 is deterministic.
    """

    def __init__(self, schedule: Schedule, clip_pred_x0: bool, eta: float = 0.0):
        super().__init__(schedule, clip_pred_x0)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta: {eta} is not in [0, 1]")
        self.eta = eta

    def needs_noise(self, t_prev: int) -> bool:
        return self.eta > 0 and float(self.schedule.abar[t_prev]) < 1.0

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
        if shift is not None and self.clip_pred_x0:
            abar = float(self.schedule.abar[t])
            eps = (x - math.sqrt(abar) * self.pred_x0(x, prediction, t)) / math.sqrt(1.0 - abar)
            prediction = Prediction(eps)
        eps, x0 = self.guided(x, prediction, shift, t)
        if pull is not None:
            x0, abar = pull(x0), float(self.schedule.abar[t])
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1.0 - abar)
        abar_prev = float(self.schedule.abar[t_prev])
        std = self.eta * math.sqrt(self.schedule.posterior(t, t_prev)[2])
        direction = math.sqrt(max(1.0 - abar_prev - std**2, 0.0)) * eps
        x_prev = math.sqrt(abar_prev) * x0 + direction
        return x_prev if noise is None else x_prev + std * noise


class DPMSolverPP(Sampler):
    """DPM-Solver++(2M), the second-order multistep solver for x0hat (Lu et al. 2022, algorithm 2).

    The first step, and the last one, where log-SNR is infinite, are of first order.
    """

    def reset(self) -> None:
        self._before: tuple[float, Tensor] | None = None

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
        if t_prev == 0:
            return x0
        now, then = self._half_log_snr(t), self._half_log_snr(t_prev)
        h = then - now
        estimate = x0
        if self._before is not None:
            earlier, x0_before = self._before
            r = (now - earlier) / h
            estimate = x0 + (x0 - x0_before) / (2.0 * r)
        self._before = (now, x0)
        abar, abar_prev = float(self.schedule.abar[t]), float(self.schedule.abar[t_prev])
        shrink = math.sqrt((1.0 - abar_prev) / (1.0 - abar))
        return shrink * x - math.sqrt(abar_prev) * math.expm1(-h) * estimate

    def _half_log_snr(self, t: int) -> float:
        """lambda_t = log(alpha_t / sigma_t)."""
        abar = float(self.schedule.abar[t])
        return 0.5 * math.log(abar / (1.0 - abar))
