"""The noise prediction that knows the data: for mixtures of Gaussians, where the posterior mean has a closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nrcg.diffusion.schedule import Schedule


def mixture_predictor(means: Tensor, std: float, schedule: Schedule) -> Callable[[Tensor, int], Tensor]:
    """E[eps | x_t] of equal parts of round Gaussians: differentiable, as a perfect network would predict it.

    Args:
        means: (K, D).
        std: Of each Gaussian, in each direction.
        schedule: abar_t.

    Returns:
        A function of x_t (B, D, 1, 1) and t in 1..T.
    """

    def predict(x: Tensor, t: int) -> Tensor:
        abar = float(schedule.abar[t])
        centres, points = abar**0.5 * means.to(x), x.flatten(1)
        variance = abar * std**2 + 1 - abar
        parts = torch.softmax(-(points[:, None] - centres).square().sum(dim=2) / (2 * variance), dim=1)
        # The noise's share of what lies between the point and the mean of the Gaussians it may come from.
        return ((1 - abar) ** 0.5 * (points - parts @ centres) / variance).reshape(x.shape)

    return predict
