"""Metrics of explanations: one row for a set, each number with its 95 % interval.

Shares are over the explanations that were made, without the images that were skipped. One whose trajectory turned
non-finite counts as a failure. docs/explanations.md defines every column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from nrcg.config.explaining import EXPONENTS
from nrcg.errors import DataError
from nrcg.evaluation.evaluate import feature_estimates, with_interval
from nrcg.evaluation.features import Extractor, extract
from nrcg.evaluation.frechet import FeatureStatistics, covariance_factor, frechet_estimate, metric_names
from nrcg.evaluation.intervals import Estimate, bootstrap_intervals, mean, share
from nrcg.evaluation.pairwise import DENSITY_K
from nrcg.evaluation.references import Reference
from nrcg.explain.explanations import Explanations, probabilities
from nrcg.explain.perceptual import Perceptual

CHANGED_LEVELS = 8
"""A pixel has changed where a channel differs by more than so many of the 256 grey levels."""


def evaluate_explanations(
    explanations: Explanations,
    *,
    judges: Mapping[str, nn.Module] | None = None,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    labels: np.ndarray | None = None,
    bits_per_dim: np.ndarray | None = None,
    seeds: Sequence[Explanations] = (),
    perceptual: Perceptual | None = None,
    seed: int = 0,
) -> dict[str, float | str]:
    """Every metric of a set of explanations.

    Args:
        explanations: Of one kind and method.
        judges: Classifiers of the same classes that never guide, by name; each adds columns NAME_<judge>.
        extractor: Features for distances, realism and diversity, such as the judge's.
        reference: Real images of the target class in the extractor's features (`nrcg.evaluation.make_reference`);
            wanted where all explanations have one target.
        labels: (N,) true classes of the images, where they are known.
        bits_per_dim: (N,) of the explanations under the diffusion model.
        seeds: The same images explained with other seeds, for the diversity over seeds.
        perceptual: LPIPS; None leaves it out.
        seed: Of the bootstrap.

    Returns:
        A row: counts, each metric NAME with NAME_lo and NAME_hi, the text `kind`, and in `missing` what could not be
        measured and why.

    Raises:
        DataError: No explanation was made, or too few for a comparison of features.
    """
    made = ~explanations.skipped
    if not made.any():
        raise DataError("no explanation was made: every image is called the target already")
    row: dict[str, float | str] = {
        "kind": explanations.kind,
        "num_images": len(explanations),
        "num_skipped": int(explanations.skipped.sum()),
        "num_nonfinite": int(explanations.nonfinite.sum()),
        "num_misclassified": float("nan") if labels is None else int((explanations.own != labels).sum()),
    }
    kept, missing = explanations.take(made), []
    estimates = class_estimates(kept)
    for name, judge in (judges or {}).items():
        seen = replace(kept, **{f: probabilities(judge, i) for f, i in _before_and_after(kept).items()})
        estimates |= {f"{metric}_{name}": one for metric, one in class_estimates(seen, kept.own).items()}
    estimates |= closeness_estimates(kept)
    if perceptual is not None and perceptual.model is not None:
        estimates["lpips"] = mean(perceptual(kept.originals, kept.images), low=0.0)
    elif perceptual is not None:
        missing.append(f"lpips: {perceptual.reason}")
    if extractor is not None:
        repeated = [other.take(made) for other in seeds]
        estimates |= feature_space_estimates(kept, extractor, reference, repeated, missing)
    if bits_per_dim is not None:
        estimates["bits_per_dim"] = mean(np.asarray(bits_per_dim)[made])
    estimates["seconds"] = mean(kept.seconds, low=0.0)
    intervals = bootstrap_intervals(estimates, seed=seed)
    for name, estimate in estimates.items():
        row |= with_interval(name, estimate.value, intervals[name])
    row["missing"] = "; ".join(missing)
    return row


def _before_and_after(explanations: Explanations) -> dict[str, np.ndarray]:
    return {"before": explanations.originals, "after": explanations.images}


def class_estimates(explanations: Explanations, own: np.ndarray | None = None) -> dict[str, Estimate]:
    """What a classifier says: `validity`, the share that it takes for the target; `flipped_elsewhere`, the share that
    it takes for neither the target nor the original class; `target_confidence` and `original_confidence`, mean
    probabilities, with `_before` of the original image.

    Args:
        explanations: With the classifier's probabilities.
        own: (N,) the original class; None: the classifier's own of the original images.
    """
    own = explanations.own if own is None else own
    rows, targets, found = np.arange(len(own)), explanations.targets, explanations.found
    finite = ~explanations.nonfinite
    estimates = {
        "validity": share((found == targets) & finite),
        "flipped_elsewhere": share((found != targets) & (found != own)),
    }
    for name, label in (("target_confidence", targets), ("original_confidence", own)):
        for ending, probability in (("_before", explanations.before), ("", explanations.after)):
            estimates[name + ending] = mean(probability[rows, label], low=0.0, high=1.0)
    return estimates


def closeness_estimates(explanations: Explanations) -> dict[str, Estimate]:
    """How far explanations are from their images, in shares of the range of pixel values: `l1`, `l15` and `l2`, the
    power means (Lp^p / D)^(1/p) of the difference over pixels and channels; `changed`, the share of pixels with a
    channel that differs by more than CHANGED_LEVELS; `total_variation`, the mean absolute step of the difference
    between neighbours, rows and columns added."""
    change = explanations.images.astype(np.int16) - explanations.originals.astype(np.int16)
    unit = (change / 255.0).reshape(len(change), -1)
    estimates = {
        name: mean((np.abs(unit) ** p).mean(axis=1) ** (1.0 / p), low=0.0, high=1.0) for name, p in EXPONENTS.items()
    }
    changed = (np.abs(change).max(axis=3) > CHANGED_LEVELS).mean(axis=(1, 2))
    steps = [np.abs(np.diff(change, axis=axis)).mean(axis=(1, 2, 3)) / 255.0 for axis in (1, 2)]
    return estimates | {
        "changed": mean(changed, low=0.0, high=1.0),
        "total_variation": mean(np.nan_to_num(np.sum(steps, axis=0)), low=0.0),
    }


def feature_space_estimates(
    explanations: Explanations,
    extractor: Extractor,
    reference: Reference | None,
    seeds: Sequence[Explanations],
    missing: list[str],
) -> dict[str, Estimate]:
    """Distances in an extractor's features: `feature_distance_<name>` of each explanation from its image; `sfid` or
    `sfd_<name>` (`split_frechet`); against the reference the columns of `nrcg.evaluation.evaluate.feature_estimates`;
    `seed_diversity_<name>`, the mean distance of explanations of one image by different seeds."""
    images, originals = extract(extractor, explanations.images), extract(extractor, explanations.originals)
    estimates = {f"feature_distance_{extractor.name}": mean(_apart(images, originals), low=0.0)}
    frechet = metric_names(extractor.name).frechet
    if len(images) >= 4:
        estimates["s" + frechet] = split_frechet(images, originals)
    else:
        missing.append(f"s{frechet}: halves of {len(images)} images are too small")
    if reference is not None and len(images) > DENSITY_K:
        estimates |= feature_estimates(images, reference)
    elif reference is not None:
        missing.append(f"realism: {len(images)} explanations, {DENSITY_K + 1} are needed")
    if seeds:
        others = [images, *(extract(extractor, other.images) for other in seeds)]
        pairs = [_apart(a, b) for place, a in enumerate(others) for b in others[:place]]
        estimates[f"seed_diversity_{extractor.name}"] = mean(np.mean(pairs, axis=0), low=0.0)
    return estimates


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) Euclidean distances of (N, dim) rows."""
    return np.linalg.norm(a.astype(np.float64) - b.astype(np.float64), axis=1)


def split_frechet(explained: np.ndarray, originals: np.ndarray) -> Estimate:
    """sFID (Jeanneret et al. 2023, ACE): the Fréchet distance by halves, so that an image that was hardly changed is
    not rewarded for standing beside itself.

    The explanations of the even places are compared with the original images of the odd ones and the other way round;
    the mean of the two distances.

    Args:
        explained: (N, dim) features of the explanations.
        originals: (N, dim) of their images, in the same order.

    Raises:
        DataError: fewer than 4 images, whose halves have no covariance.
    """
    count = len(explained)
    influence, values = np.zeros(count), []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        real = FeatureStatistics.from_features(originals[other])
        ours = FeatureStatistics.from_features(explained[half])
        estimate = frechet_estimate(explained[half], ours, real, covariance_factor(real.cov))
        values.append(estimate.value)
        influence[half] = estimate.influence * (count / len(estimate.influence)) / 2
    return Estimate(float(np.mean(values)), influence, low=0.0)
