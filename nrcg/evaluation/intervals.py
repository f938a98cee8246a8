"""95 % intervals of metrics, over the samples that might have been drawn; the reference images are held fixed.

A metric that is no plain mean comes with each sample's influence on it (its derivative, or the jackknife's
pseudo-value). The bootstrap resamples these influences: the replicates have the spread of the resampled metric to
first order, but not the bias that repeated samples give to Fréchet distances, recall and coverage, and one set of
resampled indices serves all metrics at the cost of a matrix product. See docs/evaluation.md for what an interval
covers, and what not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
REPLICATES = 1000


@dataclass(frozen=True)
class Estimate:
    """A metric of n samples.

    value: the metric. influence: (n,) of each sample on it, in units of the metric, so that the value with the samples
    weighted by w is about value + mean((w - 1) * influence); None where `interval` is known. low, high: the metric's
    range. interval: (lo, hi) in closed form instead of by resampling.
    """

    value: float
    influence: np.ndarray | None = field(default=None, repr=False)
    low: float = -np.inf
    high: float = np.inf
    interval: tuple[float, float] | None = None
    also: tuple[float, float] | None = None


def share(hits: np.ndarray) -> Estimate:
    """Share of True among (n,) booleans, with Wilson's interval."""
    return Estimate(float(np.mean(hits)), interval=wilson_interval(int(np.sum(hits)), len(hits)))


def mean(values: np.ndarray, low: float = -np.inf, high: float = np.inf) -> Estimate:
    """Mean of (n,) numbers."""
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), values - values.mean(), low, high)


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Confidence interval (low, high) of a share, successes out of n; the default z gives 95 %.

    Wilson 1927, J. Am. Stat. Assoc. 22: unlike share +- z * standard error it stays inside [0, 1] and keeps a
    width at 0 and n. Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    part = successes / n
    centre = part + z**2 / (2 * n)
    half = z * np.sqrt(part * (1 - part) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return 0.0 if successes == 0 else float(low), 1.0 if successes == n else float(high)


def share_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Difference of two shares of the same n samples, (n,) booleans each.

    Interval of Agresti and Min 2005 (Stat. Med. 24): Wald's after half a sample more in each cell of the 2 x 2 table,
    so that it keeps a width where the two never differ.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    only_first, only_second = np.sum(first & ~second) + 0.5, np.sum(second & ~first) + 0.5
    n = len(first) + 2
    centre = (only_first - only_second) / n
    half = Z95 * np.sqrt(only_first + only_second - (only_first - only_second) ** 2 / n) / n
    value = float(first.mean() - second.mean())
    return Estimate(value, interval=(max(-1.0, float(centre - half)), min(1.0, float(centre + half))))


def bootstrap_intervals(
    estimates: Mapping[str, Estimate], *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of each estimate.

    Estimates over the same n samples share their resampled indices. Values outside [low, high] are moved to the
    bound. A value that is not finite, or of fewer than 2 samples, gets (nan, nan). Deterministic given the seed.
    """
    found: dict[str, tuple[float, float]] = {}
    groups: dict[int, list[str]] = {}
    for name, estimate in estimates.items():
        if estimate.interval is not None:
            found[name] = estimate.interval
        elif not np.isfinite(estimate.value) or estimate.influence is None or len(estimate.influence) < 2:
            found[name] = (np.nan, np.nan)
        else:
            groups.setdefault(len(estimate.influence), []).append(name)
    for n, names in groups.items():
        influence = np.stack([estimates[name].influence for name in names], axis=1)
        influence = influence - influence.mean(axis=0)
        # The deviations of n resampled values have the variance (n - 1) / n of the samples'.
        deviations = _resampled_means(influence, np.random.default_rng([seed, n]), replicates) * np.sqrt(n / (n - 1))
        for column, name in enumerate(names):
            estimate = estimates[name]
            bounds = estimate.value + np.quantile(deviations[:, column], [0.025, 0.975])
            if estimate.also is not None:
                further = np.abs(np.array(estimate.also) - estimate.value)
                bounds = estimate.value + np.array([-1, 1]) * np.hypot(bounds - estimate.value, further)
            low, high = np.clip(bounds, min(estimate.low, estimate.value), max(estimate.high, estimate.value))
            found[name] = (float(low), float(high))
    return {name: found[name] for name in estimates}


def _resampled_means(values: np.ndarray, rng: np.random.Generator, replicates: int) -> np.ndarray:
    """(replicates, M) means of (n, M) values over n rows drawn with replacement."""
    n = len(values)
    means = np.empty((replicates, values.shape[1]))
    step = max(1, 2_000_000 // n)
    for start in range(0, replicates, step):
        count = min(step, replicates - start)
        drawn = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[start : start + count] = weights @ values / n
    return means


def supported(value_a: float, interval_a: tuple[float, float], value_b: float, interval_b: tuple[float, float]) -> bool:
    """Whether two values differ by more than their 95 % intervals allow.

    The difference must exceed the root of the summed squares of the half-widths that face each other: the 95 %
    interval of a difference of independent estimates from theirs (Zou and Donner 2008, Stat. Med. 27). False where
    one is nan.
    """
    if value_a > value_b:
        value_a, interval_a, value_b, interval_b = value_b, interval_b, value_a, interval_a
    if not np.isfinite([value_a, *interval_a, value_b, *interval_b]).all():
        return False
    return bool(value_b - value_a > np.hypot(interval_a[1] - value_a, value_b - interval_b[0]))
