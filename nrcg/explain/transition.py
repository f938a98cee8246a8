"""Counterfactual transition: how soon the decision turns as the largest changes are made first."""

from __future__ import annotations

import numpy as np
from torch import nn

from nrcg.explain.explanations import probabilities

STEPS = 50
"""Published number of steps from the image to its explanation."""


def transition_scores(
    classifier: nn.Module,
    originals: np.ndarray,
    images: np.ndarray,
    own: np.ndarray,
    targets: np.ndarray,
    steps: int = STEPS,
) -> np.ndarray:
    """COUT (Khorram and Fuxin 2022) of each explanation.

    Pixels of the explanation replace those of the image, the ones with the largest change (absolute, summed over the
    channels) first. Over the share of pixels replaced, the area below p(target) less that below p(own), by the
    trapezoidal rule: near 1 where the first pixels turn the decision, near -1 where it takes
    all of them or never turns.

    Args:
        originals, images: (N, H, W, C) uint8.
        own, targets: (N,) class indices.
        steps: Replaced in so many equal parts, or pixel by pixel where there are fewer.

    Returns:
        (N,) float64 in [-1, 1].
    """
    count, height, width, _ = originals.shape
    pixels, rows = height * width, np.arange(count)
    change = np.abs(images.astype(np.int16) - originals).sum(axis=3).reshape(count, pixels)
    rank = np.argsort(np.argsort(-change, axis=1, kind="stable"), axis=1)  # 0: the largest change
    replaced = np.round(np.linspace(0, pixels, min(steps, pixels) + 1)).astype(int)
    gaps = np.empty((len(replaced), count))
    for place, number in enumerate(replaced):
        mask = (rank < number).reshape(count, height, width, 1)
        seen = probabilities(classifier, np.where(mask, images, originals)).astype(np.float64)
        gaps[place] = seen[rows, targets] - seen[rows, own]
    return ((gaps[1:] + gaps[:-1]) / 2 * np.diff(replaced)[:, None]).sum(axis=0) / pixels
