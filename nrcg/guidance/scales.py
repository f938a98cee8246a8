"""Guidance scales that change along the trajectory.

A schedule maps the share of the trajectory that is left, t / T in (0, 1], to a scale >= 0. Sampling runs from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nrcg.config import ScaleScheduleConfig

ScaleSchedule = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """From `start` at t = T to `end` at t = 0, in a straight line."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)

    def __call__(self, share_left: float) -> float:
        return self.end + (self.start - self.end) * share_left


@dataclass(frozen=True)
class Cosine:
    """From `start` at t = T to `end` at t = 0, along half a cosine: level at both ends."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)

    def __call__(self, share_left: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 - math.cos(math.pi * share_left))


@dataclass(frozen=True)
class Interval:
    """`scale` where low <= t / T <= high, else 0 (guidance in a limited interval, Kynkäänniemi et al. 2024)."""

    scale: float
    low: float
    high: float

    def __post_init__(self) -> None:
        _check(scale=self.scale)
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"low, high: {self.low}, {self.high} are not 0 <= low <= high <= 1")

    def __call__(self, share_left: float) -> float:
        return self.scale if self.low <= share_left <= self.high else 0.0


SHELL_KEYS = {"constant": (), "linear": ("end",), "cosine": ("end",), "interval": ("low", "high")}
"""Schedule -> its settings that the shell names, in this order."""


def from_config(config: ScaleScheduleConfig, scale: float) -> float | ScaleSchedule:
    """The scale, or the schedule, that a method has at one scale of the sweep."""
    if config.name == "linear":
        return Linear(config.start * scale, config.end * scale)
    if config.name == "cosine":
        return Cosine(config.start * scale, config.end * scale)
    if config.name == "interval":
        return Interval(scale, config.low, config.high)
    return scale


def parse(spec: str) -> ScaleScheduleConfig:
    """The settings of a schedule from the shell: `constant`, `linear:END`, `cosine:END` (from the scale to END times
    it), or `interval:LOW,HIGH` (guidance where LOW <= t / T <= HIGH).

    Raises:
        ValueError: anything else.
    """
    name, _, rest = spec.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
    except ValueError as error:
        raise ValueError(f"scale schedule {spec!r}: {error}") from None
    keys = SHELL_KEYS.get(name)
    if keys is None or len(numbers) != len(keys):
        raise ValueError(
            f"scale schedule {spec!r} is unknown; allowed: constant, linear:END, cosine:END, interval:LOW,HIGH"
        )
    config = ScaleScheduleConfig.model_construct(name=name, **dict(zip(keys, numbers, strict=True)))
    try:
        from_config(config, 1.0)
    except ValueError as error:
        raise ValueError(f"scale schedule {spec!r}: {error}") from None
    return config


def _check(**scales: float) -> None:
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name}: {scale} is not a finite number >= 0")
