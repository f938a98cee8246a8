"""Adversarial examples: the target class by a change of the pixels alone, with no model of what images look like."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nrcg.classifiers.logits import class_log_prob
from nrcg.config.explaining import ATTACKS
from nrcg.devices import floating_type, frozen
from nrcg.guidance.guidance import log_prob_gradient
from nrcg.guidance.stabilizers import NormClip, UnitNorm


def attack(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    target: int | Tensor,
    *,
    method: str = "gradient",
    budget: float = 0.5,
    step: float = 8 / 255,
    steps: int = 100,
    skip_above: float = 0.95,
) -> Tensor:
    """Projected gradient ascent on log p(target | x) from the image itself (Madry et al. 2018), targeted.

    Args:
        classifier: images in [-1, 1] to logits.
        images: (B, C, H, W) in [-1, 1].
        target: class index, or each image's own, (B,).
        method: sign: steps along the gradient's sign, the change of each pixel at most the budget. gradient: steps
            along the gradient, the change's root mean square at most the budget.
        budget: share of the range of pixel values, in (0, 1].
        step: a step's size, likewise.
        steps: at least 1.
        skip_above: an image whose p(target) is above this stays as it is; 1: none does.

    Returns:
        (B, C, H, W) in [-1, 1]; each depends on its image alone.

    Raises:
        ValueError: another method.
    """
    if method not in ATTACKS:
        raise ValueError(f"attack: {method!r} is unknown; allowed: {', '.join(ATTACKS)}")
    length, most = 2.0 * step, 2.0 * budget  # pixel values span [-1, 1]
    direction, within = torch.sign, lambda change: change.clamp(-most, most)
    if method == "gradient":
        root = images[0].numel() ** 0.5
        unit, within = UnitNorm(), NormClip(most * root)
        direction = lambda grad: unit(grad) * root  # noqa: E731  (its root mean square is one)
    dtype, x = floating_type(classifier), images
    with frozen(classifier):
        for _ in range(steps):
            grad, logits = log_prob_gradient(lambda seen: classifier(seen.to(dtype)), target, x)
            doubtful = (class_log_prob(logits, target) <= math.log(skip_above)).reshape(-1, 1, 1, 1)
            if not doubtful.any():
                break
            moved = (images + within(x + length * direction(grad) - images)).clamp(-1.0, 1.0)
            x = torch.where(doubtful, moved, x)
    return x
