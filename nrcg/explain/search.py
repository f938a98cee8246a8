"""The least change that succeeds, for each image by bisection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FARTHEST = 16.0
"""The weight is searched up to so many times the one that was given."""


def bisect(
    near: np.ndarray,
    far: np.ndarray,
    succeeds: Callable[[np.ndarray, np.ndarray], np.ndarray],
    between: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rounds: int,
) -> np.ndarray:
    """For each image the value nearest to `near` that was seen to succeed; `far` where none was.

    `far` is tried first, and images that fail there are left. Success need not be monotone: what is found is a value
    that succeeds beside one that fails, not always the nearest of all.

    Args:
        near: (N,) values that are taken to fail; not tried.
        far: (N,) values that should succeed.
        succeeds: tries values (n,) on the images of the places (n,); says (n,) bool which succeed.
        between: the middle of two arrays of values; equal to one of them where nothing lies between.
        rounds: most trials after the first.

    Returns:
        (N,) values.
    """
    near, best = np.array(near), np.array(far)
    places = np.arange(len(best))
    places = places[succeeds(places, best)]
    for _ in range(rounds):
        middle = between(near[places], best[places])
        open_ = (middle != near[places]) & (middle != best[places])
        places, middle = places[open_], middle[open_]
        if not len(places):
            break
        good = succeeds(places, middle)
        best[places[good]], near[places[~good]] = middle[good], middle[~good]
    return best


def middle_step(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The whole number between two, rounded down."""
    return (near + far) // 2


def middle_size(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The geometric mean of two numbers of one sign."""
    return np.sign(far) * np.sqrt(near * far)
