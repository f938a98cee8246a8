"""Two-dimensional distributions whose density is known: what a likelihood can be held against.

Each is drawn in [-1, 1]^2 or a little beyond, by a seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

GRID = 640
"""Points of a side of the grid that integrates; 0.005 apart, so that a checkerboard's edges lie between them."""
HALF = 1.6
"""Half of the side of what is integrated over."""


class Density(ABC):
    """A distribution over the plane."""

    @abstractmethod
    def draw(self, count: int, seed: int) -> np.ndarray:
        """(count, 2) float64 points."""

    @abstractmethod
    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log p (N,) in nats at the points x (N, 2); -inf where there are none."""

    @cached_property
    def entropy(self) -> float:
        """-E[log p] in nats, by the midpoint rule."""
        step = 2 * HALF / GRID
        centres = -HALF + step * (np.arange(GRID) + 0.5)
        total = 0.0
        for y in centres:
            log_p = self.log_density(np.stack([centres, np.full(GRID, y)], axis=1))
            p = np.exp(log_p)
            total -= float(np.sum(p[p > 0] * log_p[p > 0]))
        return total * step**2


class GaussianMixture(Density):
    """Equal parts of round Gaussians.

    Args:
        means: (K, 2).
        std: Of each, in each direction.
    """

    def __init__(self, means: np.ndarray, std: float):
        self.means, self.std = np.asarray(means, np.float64), std

    def draw(self, count: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        chosen = random.integers(len(self.means), size=count)
        return self.means[chosen] + self.std * random.standard_normal((count, 2))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        variance = self.std**2
        squares = (np.subtract.outer(x[:, axis], self.means[:, axis]) ** 2 for axis in (0, 1))
        exponents = sum(squares) / (-2 * variance)
        most = exponents.max(axis=1, keepdims=True)
        sums = np.log(np.exp(exponents - most).sum(axis=1)) + most[:, 0]
        return sums - math.log(2 * math.pi * variance * len(self.means))


class Checkerboard(Density):
    """Even over the 8 dark squares of a board of 4 x 4 over [-1, 1]^2: discontinuous, entropy log 2."""

    def draw(self, count: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        column = random.integers(4, size=count)
        row = 2 * random.integers(2, size=count) + column % 2
        return (np.stack([column, row], axis=1) + random.random((count, 2))) / 2 - 1

    def log_density(self, x: np.ndarray) -> np.ndarray:
        square = np.floor(2 * (x + 1)).astype(int)
        dark = (square.sum(axis=1) % 2 == 0) & (x >= -1).all(axis=1) & (x < 1).all(axis=1)
        return np.where(dark, -math.log(2), -np.inf)


def eight_gaussians() -> GaussianMixture:
    """Eight Gaussians of standard deviation 0.08 on a circle of radius 0.8."""
    angles = np.arange(8) * (2 * math.pi / 8)
    return GaussianMixture(0.8 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.08)


def two_moons() -> GaussianMixture:
    """Two interleaving half circles of 64 Gaussians each, of standard deviation 0.06: a mixture, so that its density is
    known; as close as they stand, it is even along the arcs."""
    angles = (np.arange(64) + 0.5) * (math.pi / 64)
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    lower = np.stack([1 - np.cos(angles), 0.5 - np.sin(angles)], axis=1)
    return GaussianMixture((np.concatenate([upper, lower]) - [0.5, 0.25]) * 0.6, 0.06)


DENSITIES = {"eight_gaussians": eight_gaussians, "checkerboard": Checkerboard, "two_moons": two_moons}
"""Name -> what makes it."""
