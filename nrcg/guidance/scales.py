"""Guidance scales that change along the trajectory.

A schedule maps the share of the trajectory that is left, t / T in (0, 1], to a scale >= 0. Sampling runs from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nrcg.config import ScaleScheduleConfig
from nrcg.csv_files import Row, read_csv

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


@dataclass(frozen=True)
class SNR:
    """`scale` times SNR / (SNR + gamma), with SNR = abar_t / (1 - abar_t): the weight of the image in x0hat of a unit
    Gaussian seen under gamma times the noise. Weak where noise hides the image, the whole scale where it is clean.

    The schedule is asked with abar_t instead of t / T, so that it means the same on any schedule of noise.
    """

    scale: float
    gamma: float
    by_abar = True

    def __post_init__(self) -> None:
        _check(scale=self.scale)
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma: {self.gamma} is not a finite number above 0")

    def __call__(self, abar: float) -> float:
        return self.scale * abar / (abar + self.gamma * (1.0 - abar))


SHELL_KEYS = {
    "constant": (),
    "linear": ("end",),
    "cosine": ("end",),
    "interval": ("low", "high"),
    "snr": ("gamma",),
}
"""Schedule -> its settings that the shell names, in this order."""
FORWARD = "forward"
"""Schedule of the shell: the interval in which a forward analysis finds the guide informed."""


def from_config(config: ScaleScheduleConfig, scale: float) -> float | ScaleSchedule:
    """The scale, or the schedule, that a method has at one scale of the sweep."""
    if config.name == "linear":
        return Linear(config.start * scale, config.end * scale)
    if config.name == "cosine":
        return Cosine(config.start * scale, config.end * scale)
    if config.name == "interval":
        return Interval(scale, config.low, config.high)
    if config.name == "snr":
        return SNR(scale, config.gamma)
    return scale


def parse(spec: str) -> ScaleScheduleConfig:
    """The settings of a schedule from the shell: `constant`, `linear:END`, `cosine:END` (from the scale to END times
    it), `interval:LOW,HIGH` (guidance where LOW <= t / T <= HIGH), `snr:GAMMA` (SNR / (SNR + GAMMA)), or
    `forward:CSV,METHOD` (the interval in which a forward.csv finds a method's classifier informed).

    Raises:
        ValueError: anything else.
        DataError: no such forward.csv.
    """
    name, _, rest = spec.partition(":")
    if name == FORWARD:
        path, _, method = rest.rpartition(",")
        if not path:
            raise ValueError(f"scale schedule {spec!r}: forward:CSV,METHOD is expected")
        low, high = informed_interval(read_csv(path, ("method", "t", "accuracy")), method)
        return ScaleScheduleConfig(name="interval", low=low, high=high)
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
    except ValueError as error:
        raise ValueError(f"scale schedule {spec!r}: {error}") from None
    keys = SHELL_KEYS.get(name)
    if keys is None or len(numbers) != len(keys):
        raise ValueError(
            f"scale schedule {spec!r} is unknown; allowed: constant, linear:END, cosine:END, interval:LOW,HIGH,"
            " snr:GAMMA, forward:CSV,METHOD"
        )
    config = ScaleScheduleConfig.model_construct(name=name, **dict(zip(keys, numbers, strict=True)))
    try:
        from_config(config, 1.0)
    except ValueError as error:
        raise ValueError(f"scale schedule {spec!r}: {error}") from None
    return config


def informed_interval(rows: Sequence[Row], method: str) -> tuple[float, float]:
    """The shares (low, high) of the trajectory at which what a guide is shown tells it the class.

    From the forward analysis (figs. 1 and 2): up to the largest t at which the accuracy is still half way between that
    at t = T, where nothing is seen, and its best. Below, the gradient points to the class (eq. 6); above, to noise.

    Args:
        rows: Of a forward.csv: method, t, accuracy.
        method: Whose classifier and input guide.

    Raises:
        ValueError: No such method, or it never tells the class.
    """
    own = sorted((row["t"], row["accuracy"]) for row in rows if row["method"] == method)
    if not own:
        known = ", ".join(dict.fromkeys(str(row["method"]) for row in rows))
        raise ValueError(f"method {method!r} is not in the forward analysis; it has {known}")
    last, blind = own[-1]
    best = max(accuracy for _, accuracy in own)
    if best <= blind:
        raise ValueError(f"method {method!r}: its accuracy is nowhere above that at t = T")
    return 0.0, max(t for t, accuracy in own if accuracy >= (best + blind) / 2) / last


def _check(**scales: float) -> None:
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name}: {scale} is not a finite number >= 0")
