"""Cone projection: keep of a guide's gradient what a robust classifier's agrees with (DVCE, NeurIPS 2022, eq. 12)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONE_ANGLE = 30.0
"""Published half-angle, in degrees."""


def checked_angle(degrees: float) -> float:
    """A half-angle as it is. Raises ValueError outside [0, 90], where a cone is not convex."""
    if not 0.0 <= degrees <= 90.0:
        raise ValueError(f"cone_angle: {degrees} is not in [0, 90] degrees")
    return float(degrees)


def cone_projection(gradient: Tensor, axis: Tensor, degrees: float = CONE_ANGLE) -> Tensor:
    """The point of a cone that is nearest to a gradient, for each sample.

    Inside the cone the gradient stays. Beside it, with the axis v^ = v / norm2(v) and w^ the direction of the part of u
    at right angles to v, it is projected on the ray r = cos(alpha) v^ + sin(alpha) w^. Where u points away from the
    whole cone, by more than 90 degrees from every ray, the nearest point is its tip: 0. (Eq. 12 alone would turn such
    a gradient round, out of the cone.)

    Args:
        gradient: u, (B, C, H, W), the guide's.
        axis: v, (B, C, H, W), the robust classifier's. Where it is 0 there is no cone, and u stays.
        degrees: half-angle alpha of the cone, in [0, 90].

    Returns:
        (B, C, H, W), in the gradient's type.

    Raises:
        ValueError: the angle is out of range.
    """
    alpha = math.radians(checked_angle(degrees))
    # Each over its largest value, in float64: squares of gradients as small as 1e-25 are lost in float32.
    u, v = (one.flatten(1).double() for one in (gradient, axis))
    tiny = torch.finfo(torch.float64).tiny
    size = u.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    u, v = u / size, v / v.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    length = v.norm(dim=1, keepdim=True)
    v = v / length.clamp(min=tiny)
    along = (u * v).sum(dim=1, keepdim=True)
    across = u - along * v
    height = across.norm(dim=1, keepdim=True)
    inside = (torch.atan2(height, along) <= alpha) | (length == 0)
    ray = math.cos(alpha) * v + math.sin(alpha) * across / height.clamp(min=tiny)
    projected = (along * math.cos(alpha) + height * math.sin(alpha)).clamp(min=0.0) * ray
    return torch.where(inside, gradient.flatten(1), (projected * size).to(gradient.dtype)).reshape(gradient.shape)
