"""The diffusion model: schedule, forward process, one-step denoised image, posterior, and its U-Net.

Time follows the paper: t = 1..T, with x_0 the clean image; diffusers' timestep is t - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from nrcg.config import ScheduleConfig


VARIANCES = ("fixed_small", "fixed_large", "learned_range")
"""Sigma_t of p(x_{t-1} | x_t): the posterior's, beta_t, or between the two as the U-Net says (Nichol and Dhariwal 2021,
eq. 15)."""


class Schedule:
    """abar_t for t = 0..T in float64, abar_0 = 1.

    Args:
        betas: (T,) variances beta_1..beta_T, each in (0, 1).
    """

    def __init__(self, betas: Tensor):
        betas = betas.detach().to("cpu", torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas: expected a vector of numbers in (0, 1)")
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1.0 - betas, dim=0)])
        self.num_steps = len(betas)
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def of_levels(cls, abar: Tensor) -> Schedule:
        """A schedule by its levels, (T + 1,) from abar_0, each in [0, 1]: those that a sampler steps through."""
        schedule = cls.__new__(cls)
        schedule.abar, schedule.num_steps, schedule._tables = abar.detach().to("cpu", torch.float64), len(abar) - 1, {}
        return schedule

    @classmethod
    def linear(cls, num_steps: int, beta_start: float, beta_end: float) -> Schedule:
        """Betas linear from beta_start to beta_end (Ho et al. 2020)."""
        return cls(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """The schedule by diffusers' names: linear, scaled_linear (linear in the root of beta; Rombach et al. 2022),
        squaredcos_cap_v2 (Nichol and Dhariwal 2021, eq. 17, betas capped at 0.999)."""
        if config.beta_schedule == "linear":
            return cls.linear(config.num_train_timesteps, config.beta_start, config.beta_end)
        if config.beta_schedule == "scaled_linear":
            ends = (config.beta_start**0.5, config.beta_end**0.5)
            return cls(torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64) ** 2)
        share = torch.linspace(0, 1, config.num_train_timesteps + 1, dtype=torch.float64)
        abar = torch.cos((share + 0.008) / 1.008 * torch.pi / 2) ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    @classmethod
    def from_scheduler(cls, scheduler: DDPMScheduler) -> Schedule:
        """The schedule of a diffusers scheduler."""
        return cls(scheduler.betas)

    def at(self, t: Tensor | int, like: Tensor) -> Tensor:
        """abar_t shaped to broadcast over `like` (B, C, H, W), in like's dtype and device."""
        if isinstance(t, Tensor) and t.device.type != "cpu":
            # The table goes to t's device, once: t coming to the CPU would hold up a GPU at every step.
            if t.device not in self._tables:
                self._tables[t.device] = self.abar.to(torch.float32).to(t.device)
            abar = self._tables[t.device][t.long()]
        else:
            abar = self.abar[torch.as_tensor(t).long()]
        return abar.reshape(-1, *[1] * (like.ndim - 1)).to(like.device, like.dtype)

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """eq. 2: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Args:
            x0: (B, C, H, W) in [-1, 1].
            t: one step or (B,) steps, 0..T; x_0 at t = 0.
            noise: eps, shaped like x0.
        """
        abar = self.at(t, x0)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise

    def pred_x0(self, x_t: Tensor, eps: Tensor, t: Tensor | int, *, clip: bool = False) -> Tensor:
        """eq. 5, the one-step denoised image: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); clip: to [-1, 1]."""
        abar = self.at(t, x_t)
        x0 = (x_t - (1.0 - abar).sqrt() * eps) / abar.sqrt()
        return x0.clamp(-1.0, 1.0) if clip else x0

    def posterior(self, t: int, t_prev: int | None = None) -> tuple[float, float, float]:
        """q(x_prev | x_t, x_0) of Ho et al. 2020, eqs. 6 and 7.

        Args:
            t: step, 1..T.
            t_prev: the step reached, t - 1 unless steps are skipped.

        Returns:
            (a, b, variance): the mean is a * x_0 + b * x_t; the variance is Sigma_t (`fixed_small`), 0 at t_prev = 0.
        """
        t_prev = t - 1 if t_prev is None else t_prev
        abar, abar_prev = float(self.abar[t]), float(self.abar[t_prev])
        alpha = abar / abar_prev
        beta = 1.0 - alpha
        return (
            abar_prev**0.5 * beta / (1.0 - abar),
            alpha**0.5 * (1.0 - abar_prev) / (1.0 - abar),
            (1.0 - abar_prev) / (1.0 - abar) * beta,
        )

    def positive_variance(self, t: int) -> float:
        """The posterior's variance at t; at t = 1, where it is 0, that of t = 2 stands in for it (Nichol and Dhariwal
        2021), or beta_1 where there is no other step."""
        return self.posterior(max(t, 2))[2] if self.num_steps > 1 else 1.0 - float(self.abar[1])
