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
from nrcg.explain.repeats import noise_estimates, seed_estimates
from nrcg.explain.transition import transition_scores

CHANGED_LEVELS = 8
"""A pixel has changed where a channel differs by more than so many of the 256 grey levels."""
VERIFIED = 0.5
"""Cosine above which face verification takes two pictures for one person (DiME 2022, ACE 2023)."""


def evaluate_explanations(
    explanations: Explanations,
    *,
    guide: nn.Module | None = None,
    judges: Mapping[str, nn.Module] | None = None,
    extractors: Sequence[Extractor] = (),
    references: Sequence[Reference] = (),
    identities: Sequence[Extractor] = (),
    identity_threshold: float = VERIFIED,
    labels: np.ndarray | None = None,
    bits_per_dim: np.ndarray | None = None,
    seeds: Sequence[Explanations] = (),
    noised: Explanations | None = None,
    perceptual: Perceptual | None = None,
    seed: int = 0,
) -> dict[str, float | str]:
    """Every metric of a set of explanations.

    Args:
        explanations: Of one kind and method.
        guide: The classifier that is explained, for `cout`.
        judges: Classifiers of the same classes that never guide, by name; each adds columns NAME_<judge>.
        extractors: Features for distances, realism and diversity, such as the judge's.
        references: Real images in each extractor's features (`nrcg.evaluation.make_reference`), one for each, or none;
            with a target class where all explanations aim at it.
        identities: Features that say whose picture it is, such as those of a face recognition network.
        identity_threshold: Cosine above which two pictures show the same.
        labels: (N,) true classes of the images, where they are known.
        bits_per_dim: (N,) of the explanations under the diffusion model.
        seeds: The same images explained with other seeds, for what differs between seeds.
        noised: The same images with a little noise, explained for the same targets by the same seed.
        perceptual: LPIPS; None leaves it out.
        seed: Of the bootstrap.

    Returns:
        A row: counts, each metric NAME with NAME_lo and NAME_hi, the text `kind`, and in `missing` what could not be
        measured and why.

    Raises:
        DataError: No explanation was made, or too few for a comparison of features.
    """
    made, missing = ~explanations.skipped, []
    if not made.any():
        raise DataError("no explanation was made: every image is called the target already")
    kept, *others = runs = [one.take(made) for one in (explanations, *seeds)]
    estimates = class_estimates(kept)
    for name, judge in (judges or {}).items():
        seen = replace(kept, **{f: probabilities(judge, i) for f, i in _before_and_after(kept).items()})
        estimates |= {f"{metric}_{name}": one for metric, one in class_estimates(seen, kept.own).items()}
    estimates |= closeness_estimates(kept)
    if guide is not None:
        estimates |= transition_estimates(guide, kept, missing)
    if perceptual is not None and perceptual.model is not None:
        estimates["lpips"] = mean(perceptual(kept.originals, kept.images), low=0.0)
    elif perceptual is not None:
        missing.append(f"lpips: {perceptual.reason}")
    for place, extractor in enumerate(extractors):
        reference, suffix = references[place] if references else None, f"_{extractor.name}" if place else ""
        estimates |= feature_space_estimates(runs, extractor, reference, missing, suffix)
    for extractor in identities:
        estimates |= identity_estimates(kept, extractor, identity_threshold)
    estimates |= seed_estimates(runs) if others else {}
    estimates |= noise_estimates(kept, noised.take(made), missing) if noised is not None else {}
    if bits_per_dim is not None:
        estimates["bits_per_dim"] = mean(np.asarray(bits_per_dim)[made])
    estimates["seconds"] = mean(kept.seconds, low=0.0)
    row, intervals = _counts(explanations, labels), bootstrap_intervals(estimates, seed=seed)
    for name, estimate in estimates.items():
        row |= with_interval(name, estimate.value, intervals[name])
    return row | _described(references) | {"missing": "; ".join(missing)}


def _counts(explanations: Explanations, labels: np.ndarray | None) -> dict[str, float | str]:
    return {
        "kind": explanations.kind,
        "num_images": len(explanations),
        "num_skipped": int(explanations.skipped.sum()),
        "num_nonfinite": int(explanations.nonfinite.sum()),
        "num_misclassified": float("nan") if labels is None else int((explanations.own != labels).sum()),
    }


def _described(references: Sequence[Reference]) -> dict[str, float | str]:
    """Which real images the explanations are compared with, as in an evaluation of samples."""
    if not references:
        return {}
    everything, target = references[0].everything, references[0].target
    return {
        "num_reference": everything.statistics.n,
        "num_reference_target": target.statistics.n if target else 0,
        "protocols": " | ".join(dict.fromkeys(one.identity["protocol"] for one in references)),
        "reference": " | ".join(dict.fromkeys(one.identity["reference"] for one in references)),
    }


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


def transition_estimates(guide: nn.Module, explanations: Explanations, missing: list[str]) -> dict[str, Estimate]:
    """`cout`, the mean of `transition_scores` by the guide, over the explanations that aim at another class."""
    other = explanations.targets != explanations.own
    if not other.any():
        missing.append("cout: the class aimed at is the image's own")
        return {}
    some = explanations.take(other)
    scores = transition_scores(guide, some.originals, some.images, some.own, some.targets)
    return {"cout": mean(scores, low=-1.0, high=1.0)}


def identity_estimates(explanations: Explanations, extractor: Extractor, threshold: float) -> dict[str, Estimate]:
    """Whether an explanation still shows the same as its image: `identity_similarity_<name>`, the mean cosine of both
    images' features (FS, ACE 2023), and `identity_verified_<name>`, the share above the threshold (FVA, DiME 2022)."""
    a, b = (extract(extractor, images).astype(np.float64) for images in _before_and_after(explanations).values())
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(size, np.finfo(np.float64).tiny)
    return {
        f"identity_similarity_{extractor.name}": mean(cosine, low=-1.0, high=1.0),
        f"identity_verified_{extractor.name}": share(cosine > threshold),
    }


def feature_space_estimates(
    runs: Sequence[Explanations],
    extractor: Extractor,
    reference: Reference | None,
    missing: list[str],
    suffix: str = "",
) -> dict[str, Estimate]:
    """Distances in an extractor's features: `feature_distance_<name>` of each explanation from its image; `sfid` or
    `sfd_<name>` (`split_frechet`); against the reference the columns of `nrcg.evaluation.evaluate.feature_estimates`;
    `seed_diversity_<name>`, the mean distance of explanations of one image by different seeds.

    Args:
        runs: The explanations, then the same images' by other seeds.
        suffix: Of the names that do not hold the extractor's already.
    """
    others = [extract(extractor, run.images) for run in runs]
    images, originals = others[0], extract(extractor, runs[0].originals)
    estimates = {f"feature_distance_{extractor.name}": mean(_apart(images, originals), low=0.0)}
    frechet = metric_names(extractor.name).frechet
    if len(images) >= 4:
        estimates["s" + frechet] = split_frechet(images, originals)
    else:
        missing.append(f"s{frechet}: halves of {len(images)} images are too small")
    if reference is not None and len(images) > DENSITY_K:
        estimates |= feature_estimates(images, reference, suffix=suffix)
    elif reference is not None:
        missing.append(f"realism by {extractor.name}: {len(images)} explanations, {DENSITY_K + 1} are needed")
    if len(runs) > 1:
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
