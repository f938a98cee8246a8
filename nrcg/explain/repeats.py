"""Several explanations of one image: by other seeds, and of the image with a little noise; how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from torch import nn

from nrcg.config.explaining import ExplainSettings
from nrcg.data.arrays import to_uint8, to_unit
from nrcg.diffusion.noise import sample_noise, spawn_seed
from nrcg.evaluation.intervals import Estimate, mean, share
from nrcg.explain.engine import explain_images
from nrcg.explain.explanations import Explanations
from nrcg.guidance.pipeline import GuidedDDPMPipeline

NOISED = "noised"
"""Name of the run that explains the images with noise."""
NOISE_WORD = 2
"""Word of the seed of the noise that is added to images: it is not the sampler's."""


@dataclass(frozen=True)
class Repeat:
    """One of the runs that explain the same images.

    Attributes:
        name: Number of the seed, from 0; or NOISED.
        settings: With the run's seed.
        noise: Standard deviation of the noise added to the images, as a share of the range of pixel values.
    """

    name: str
    settings: ExplainSettings
    noise: float = 0.0

    def images(self, originals: np.ndarray, samples: Sequence[int]) -> np.ndarray:
        """(N, H, W, C) uint8 that the run explains; an image's noise depends on the seed and its number alone."""
        if not self.noise:
            return originals
        x = to_unit(originals)
        noise = sample_noise(spawn_seed(self.settings.seed, NOISE_WORD), samples, 0, x.shape[1:])
        return to_uint8(x + 2.0 * self.noise * noise)  # pixel values span [-1, 1]; clamped

    def explain(
        self,
        pipe: GuidedDDPMPipeline,
        classifier: nn.Module,
        originals: np.ndarray,
        targets: np.ndarray,
        *,
        samples: Sequence[int],
        **run: Any,
    ) -> Explanations:
        """The run's explanations.

        Args:
            targets: (N,) of the images without noise (`aims_of`), so that every run answers the same question.
            samples: Each image's number.
            run: As of `explain_images`.
        """
        images = self.images(originals, samples)
        return explain_images(pipe, classifier, images, targets, self.settings, samples=samples, **run)


def repeats_of(settings: ExplainSettings, num_seeds: int = 1, noise: float = 0.0) -> list[Repeat]:
    """The runs: seeds from the settings' own on, then, with a noise, the images with it by the first seed, so that
    nothing but the image differs."""
    seeds = [Repeat(str(number), replace(settings, seed=settings.seed + number)) for number in range(num_seeds)]
    return seeds + ([Repeat(NOISED, settings, noise)] if noise else [])


def seed_estimates(runs: Sequence[Explanations]) -> dict[str, Estimate]:
    """How much explanations of the same images by two or more seeds agree.

    `seed_validity`, the mean over the images of the share of seeds that succeed; `seed_always`, the share of images
    with which every seed does; `seed_diversity_l1`, the mean L1 distance of two explanations of one image, as a share
    of the range of pixel values; `seed_spread_l1`, the standard deviation over the seeds (over S - 1) of an
    explanation's L1 distance from its image, mean over the images.
    """
    succeeded = np.stack([one.succeeded for one in runs])
    away = np.stack([_l1(one.images, one.originals) for one in runs])
    between = np.stack([_l1(a.images, b.images) for a, b in combinations(runs, 2)])
    return {
        "seed_validity": mean(succeeded.mean(axis=0), low=0.0, high=1.0),
        "seed_always": share(succeeded.all(axis=0)),
        "seed_diversity_l1": mean(between.mean(axis=0), low=0.0, high=1.0),
        "seed_spread_l1": mean(away.std(axis=0, ddof=1), low=0.0),
    }


def noise_estimates(plain: Explanations, noised: Explanations, missing: list[str]) -> dict[str, Estimate]:
    """Whether explanations of images and of the same images with a little noise agree.

    `noise_kept`, the share of images that the guide calls the same with the noise: the others are another question,
    and the rest is over these alone. `noise_agreement`, the share whose two explanations the guide gives one class;
    `noise_ratio`, the mean of norm2(e' - e) / norm2(x' - x*) for explanations e, e' of x* and the noised x': above 1
    a change of the image is amplified.
    """
    kept = plain.own == noised.own
    estimates = {"noise_kept": share(kept)}
    images = [one.astype(np.float64) for one in (plain.originals, noised.originals, plain.images, noised.images)]
    given, found = (np.linalg.norm((b - a).reshape(len(a), -1), axis=1) for a, b in (images[:2], images[2:]))
    moved = kept & (given > 0)
    if not moved.any():
        missing.append("noise_ratio: no image that the noise changes and that is still called the same")
        return estimates
    same = (plain.found == noised.found) & ~plain.nonfinite & ~noised.nonfinite
    return estimates | {
        "noise_agreement": share(same[moved]),
        "noise_ratio": mean(found[moved] / given[moved], low=0.0),
    }


def _l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) mean absolute difference of (N, H, W, C) uint8 images, as a share of the range."""
    return np.abs(a.astype(np.int16) - b).reshape(len(a), -1).mean(axis=1) / 255.0
