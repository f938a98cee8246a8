"""What explanations are held against: real images of the target class, and any images made otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from nrcg.errors import DataError
from nrcg.explain.explanations import Explanations, probabilities

BLOCK_BYTES = 2**27


def nearest_images(
    originals: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    progress: Callable[[int], object] = lambda done: None,
) -> np.ndarray:
    """For each image the nearest of real images of its target class, by L1.

    Args:
        originals: (N, H, W, C) uint8.
        images: (M, H, W, C) uint8, such as the training images; read in blocks.
        labels: (M,) class indices.
        targets: (N,) class indices.
        progress: called with the number of originals done.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        DataError: there is no image of a target class.
    """
    found = np.empty_like(originals)
    size = max(1, BLOCK_BYTES // originals[0].size // 2)
    done = 0
    for target in np.unique(targets):
        places = np.flatnonzero(labels == target)
        if not len(places):
            raise DataError(f"no real image of the target class {target}")
        rows = np.flatnonzero(targets == target)
        best = np.full(len(rows), np.inf)
        for first in range(0, len(places), size):
            block = np.asarray(images[places[first : first + size]]).astype(np.int16)
            for place, row in enumerate(rows):
                apart = np.abs(block - originals[row].astype(np.int16)).reshape(len(block), -1).mean(axis=1)
                if apart.min() < best[place]:
                    best[place] = apart.min()
                    found[row] = images[places[first + int(apart.argmin())]]
        done += len(rows)
        progress(done)
    return found


def judged(
    classifier: nn.Module, originals: np.ndarray, images: np.ndarray, targets: np.ndarray, kind: str
) -> Explanations:
    """Images that were made or found otherwise, as explanations of a classifier.

    Args:
        originals, images: (N, H, W, C) uint8.
        targets: (N,) class indices.
        kind: What they are called.
    """
    before, nothing = probabilities(classifier, originals), np.zeros(len(originals))
    return Explanations(
        originals=originals,
        images=images,
        starts=originals,
        targets=np.asarray(targets, np.int64),
        before=before,
        after=probabilities(classifier, images),
        tau=nothing,
        weight=nothing,
        skipped=before.argmax(axis=1) == targets,
        nonfinite=nothing > 0,
        seconds=nothing,
        classes=getattr(classifier, "classes", None),
        kind=kind,
    )
