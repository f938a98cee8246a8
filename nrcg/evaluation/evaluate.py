"""Evaluation of samples: accuracies, distances to real images, diversity, each with its 95 % interval.

`evaluate_images` takes arrays of images, `evaluate_features` their features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import calibration_error, class_hits, predict, predicted_class
from nrcg.errors import DataError
from nrcg.evaluation.features import Extractor, extract
from nrcg.evaluation.frechet import FeatureStatistics, frechet_estimate, metric_names
from nrcg.evaluation.intervals import Z95, Estimate, bootstrap_intervals, share, share_difference
from nrcg.evaluation.pairwise import (
    across,
    fixed_choice,
    kernel_estimate,
    mean_pair_distance,
    neighbour_estimates,
    require_neighbours,
    within,
)
from nrcg.evaluation.references import Reference, ReferenceSet

BATCH = 256


def evaluate_images(
    samples: np.ndarray | Iterable[np.ndarray],
    references: Sequence[Reference],
    extractors: Sequence[Extractor],
    *,
    target: int | None = None,
    judge: Classifier | None = None,
    guide: Classifier | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> dict[str, float | str]:
    """Every metric of a set of samples, from one pass over them.

    Args:
        samples: (N, H, W, C) uint8, or an iterable of such arrays, N in all.
        references: one per extractor, in its order (`make_reference`). The first is the headline: its precision,
            recall and so on carry no suffix.
        extractors: the protocols.
        target: the class that was aimed at, for judge and guide. A reference of `make_reference` knows its own.
        judge, guide: classifiers that score the samples; None leaves out what they say.
        seed: of the bootstrap.
        device: of the pairwise products; extractors and classifiers stay where they are.
        progress: called with the number of samples done, after every batch.

    Returns:
        A row: each metric NAME with its 95 % interval NAME_lo, NAME_hi (docs/evaluation.md), the counts of images,
        and the texts `protocols` and `reference`, which must be equal for two rows to be comparable.

    Raises:
        DataError: too few samples, or an extractor of another protocol than its reference.
    """
    for extractor, reference in zip(extractors, references, strict=True):
        theirs = getattr(extractor, "protocol", "unknown")
        if (extractor.name, theirs) != (reference.name, reference.protocol):
            raise DataError(
                f"the reference was made by {reference.name} ({reference.protocol}), the samples' features by "
                f"{extractor.name} ({theirs}): they cannot be compared"
            )
    if (judge is not None or guide is not None) and target is None:
        raise ValueError("judge and guide need a target")
    features: list[list[np.ndarray]] = [[] for _ in extractors]
    hits: dict[str, list[np.ndarray]] = {"guide": [], "judge": []}
    done = 0
    for batch in _batches(samples):
        for found, extractor in zip(features, extractors, strict=True):
            found.append(extract(extractor, batch))
        for name, classifier in (("guide", guide), ("judge", judge)):
            if classifier is not None:
                hits[name].append(class_hits(predict(classifier, batch), target))
        done += len(batch)
        if progress is not None:
            progress(done)
    if done < 2:
        raise DataError(f"an evaluation needs at least 2 samples, got {done}")
    return evaluate_features(
        [np.concatenate(found) for found in features],
        references,
        hits={name: np.concatenate(parts) for name, parts in hits.items() if parts},
        seed=seed,
        device=device,
    )


def evaluate_features(
    features: Sequence[np.ndarray],
    references: Sequence[Reference],
    *,
    hits: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, float | str]:
    """The row of `evaluate_images` from features that were extracted before.

    Args:
        features: (N, dim) of the samples, one array per reference.
        references: as there.
        hits: `guide` and `judge` to (N,) bool: which samples that classifier takes for the target.
        seed, device: as there.

    Raises:
        DataError: too few samples, or features that are not finite.
    """
    done = len(features[0])
    if done < 2:
        raise DataError(f"an evaluation needs at least 2 samples, got {done}")
    scored = dict(hits or {})
    estimates = {f"accuracy_{name}": share(hit) for name, hit in scored.items()}
    if len(scored) == 2:
        estimates["accuracy_gap"] = share_difference(scored["guide"], scored["judge"])
    for position, (found, reference) in enumerate(zip(features, references, strict=True)):
        estimates |= feature_estimates(
            found,
            reference,
            suffix="" if position == 0 else f"_{reference.name}",
            chosen=scored.get("judge"),
            device=device,
        )
    intervals = bootstrap_intervals(estimates, seed=seed)
    everything, target_set = references[0].everything, references[0].target
    row: dict[str, float | str] = {
        "num_samples": done,
        "num_reference": everything.statistics.n,
        "num_reference_target": target_set.statistics.n if target_set else 0,
        "num_pairwise": min(done, references[0].num_pairwise or done),
    }
    for name, estimate in estimates.items():
        row |= with_interval(name, estimate.value, intervals[name])
    for kind, column in (("protocol", "protocols"), ("reference", "reference")):
        row[column] = " | ".join(dict.fromkeys(reference.identity[kind] for reference in references))
    return row


def with_interval(name: str, value: float, interval: Sequence[float]) -> dict[str, float]:
    """A metric's columns: NAME, NAME_lo, NAME_hi."""
    return {name: value, f"{name}_lo": interval[0], f"{name}_hi": interval[1]}


def with_error(name: str, value: float, error: float) -> dict[str, float]:
    """The same from a standard error."""
    return with_interval(name, value, (value - Z95 * error, value + Z95 * error))


def _batches(samples: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for images in [samples] if isinstance(samples, np.ndarray) else samples:
        for first in range(0, len(images), BATCH):
            yield images[first : first + BATCH]


def feature_estimates(
    features: np.ndarray,
    reference: Reference,
    *,
    suffix: str = "",
    chosen: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Estimate]:
    """The feature metrics of one protocol, by column name.

    features: (N, dim) of the samples. suffix: of the names that do not hold the protocol's already. chosen: (N,)
    bool, the samples whose diversity is measured, those that the judge takes for the target; None: all.

    Pairwise metrics take `reference.num_pairwise` samples, a fixed random choice. Without a target class
    the class-conditional columns are left out. Raises DataError with too few images.
    """
    names = metric_names(reference.name)
    statistics = FeatureStatistics.from_features(features)
    compared = fixed_choice(len(features), reference.num_pairwise)
    few = features if len(compared) == len(features) else features[compared]
    chosen = np.ones(len(few), bool) if chosen is None else np.asarray(chosen, bool)[compared]
    pairs = within(few, chosen=chosen, device=device)
    found: dict[str, Estimate] = {}

    def compare(real: ReferenceSet, frechet: str, kernel: str, ending: str, keep: Sequence[str]) -> None:
        require_neighbours(len(few), len(real.features))
        found[frechet] = frechet_estimate(features, statistics, real.statistics, real.factor)
        between = across(few, real.features, pairs, real.pairs, device=device)
        found[kernel] = kernel_estimate(pairs, real.pairs, between)
        near = neighbour_estimates(real.pairs, between)
        found.update({f"{name}{ending}{suffix}": near[name] for name in keep})

    shares = ("precision", "recall", "density", "coverage")
    if reference.target is None:
        compare(reference.everything, names.frechet, names.kernel, "", (*shares, "off_manifold"))
    else:
        compare(reference.everything, names.frechet, names.kernel, "_all", shares)
        compare(reference.target, names.class_frechet, names.class_kernel, "", (*shares, "off_manifold"))
    spread = mean_pair_distance(pairs, chosen)
    unit = reference.distance or np.nan  # equal images have no diversity to be held against
    influence = None if spread.influence is None else spread.influence / unit
    found[f"diversity{suffix}"] = Estimate(spread.value / unit, influence, low=0.0)
    return found


def classifier_quality(classifier: Classifier, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict:
    """How far a classifier can be believed on clean images: `clean_accuracy` and `ece` (`calibration_error`),
    each [value, lo, hi]; Wilson's interval and a percentile bootstrap of 200 replicates."""
    logits = predict(classifier, images)
    accuracy = share(predicted_class(logits) == labels)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(labels), size=len(labels)) for _ in range(200))
    replicates = [calibration_error(logits[drawn], labels[drawn]) for drawn in draws]
    value = calibration_error(logits, labels)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return {
        "clean_accuracy": [accuracy.value, *accuracy.interval],
        "ece": [value, min(value, float(low)), max(value, float(high))],
        "num_images": len(labels),
    }
