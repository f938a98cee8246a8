"""Evaluation of anybody's images or features, outside the workflow: `nrcg evaluate --samples ... --reference ...`.

Every number comes from `nrcg.evaluation.evaluate`, so that it equals what the workflow would say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg.batching import BatchSize, in_batches
from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import class_hits, class_index, predict
from nrcg.classifiers.specs import load_classifier
from nrcg.errors import DataError
from nrcg.evaluation.evaluate import evaluate_features
from nrcg.evaluation.features import (
    Extractor,
    extract,
    load_extractor,
    resolve_features,
)
from nrcg.evaluation.frechet import rank_warning
from nrcg.evaluation.pairwise import DENSITY_K
from nrcg.evaluation.references import Reference, ReferenceCollector
from nrcg.evaluation.sides import ImageList, Side, numbered, with_channels

GIVEN = "given"
"""`features` of sides that hold feature vectors already."""
AUTO_BATCH = 64
FEW = 50
"""Below so many images a side, a warning says that intervals are rough."""


@dataclass(frozen=True)
class Given:
    """What `Reference` wants to know of an extractor, for features that were made elsewhere."""

    dim: int
    name: str = GIVEN
    protocol: str = "features as given"


def evaluate_custom(
    samples: Side,
    reference: Side,
    *,
    features: Sequence[str] = ("auto",),
    weights_dir: str | Path = "weights",
    classifier: str | None = None,
    target: str | None = None,
    num_samples: int | None = None,
    num_pairwise: int | None = 10_000,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_plan: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None,
) -> tuple[dict[str, float | str], list[str]]:
    """Every metric of somebody's samples against somebody's reference.

    Args:
        samples, reference: of `open_side`.
        features: protocols as in `evaluation.features`. auto: each Inception whose weights lie in `weights_dir`, and
            the judge where a classifier is given. "given": both sides hold features; needs not be said.
        classifier: SPEC or folder of a judge for the accuracy, and for the protocol `judge`.
        target: a class of the reference's labels, and of the classifier; the distances to it are added.
        num_samples: only the first samples; None: all.
        num_pairwise: images that are compared in pairs; None: all.
        batch_size: images at once; auto: 64, fewer where memory runs out.
        seed: of the bootstrap.
        device: of the networks and of the pairwise products.
        on_plan: called with the number of images to read, gives what is called with the number done.

    Returns:
        The row of `nrcg.evaluation.evaluate.evaluate_images` with `samples` and `reference` described, and warnings.

    Raises:
        DataError: a comparison that makes no sense, in one line.
    """
    _check_sides(samples, reference, num_samples)
    if target is not None:
        _require_labels(reference)
    count, judge, aim = num_samples or samples.count, None, None
    if samples.features is not None:
        _check_given(samples, reference, features, classifier)
        extractors: list[Extractor | Given] = [Given(reference.features.shape[1])]
    elif classifier is not None:
        judge = load_classifier(classifier).to(device)
        aim = None if target is None else _class_of(judge, target)
    chosen = None if target is None else target_images(reference, target, judge, aim)
    if samples.features is None:
        protocols = chosen_protocols(features, weights_dir, judge)
        extractors = [load_extractor(one, weights_dir=weights_dir, judge=judge, device=device) for one in protocols]
    report = on_plan(count + reference.count)
    references = _collect(reference, extractors, chosen, num_pairwise, batch_size, device, report)
    scores: list[np.ndarray] = []
    found: list[list[np.ndarray]] = [[] for _ in extractors]
    for first, chunk in numbered(samples, count):
        for rows, extractor in zip(found, extractors, strict=True):
            rows.append(_features(extractor, chunk, batch_size))
        if aim is not None:
            scores.append(class_hits(_logits(judge, chunk, batch_size), aim))
        report(reference.count + first + len(chunk))
    hits = {"judge": np.concatenate(scores)} if scores else None
    vectors = [np.concatenate(rows) for rows in found]
    row = evaluate_features(vectors, references, hits=hits, seed=seed, device=device)
    for column, side in (("protocols", samples), ("reference", reference)):
        if side.image_size is not None:
            row[column] += f", resized to {side.image_size} first"
    warnings = _warnings(extractors, row, vectors[0])
    if judge is not None and aim is None:
        warnings.append("without --target there is no accuracy")
    return {"samples": str(samples.path), "target": target or "", **row}, warnings


def _collect(
    reference: Side,
    extractors: Sequence[Extractor | Given],
    chosen: np.ndarray | None,
    num_pairwise: int | None,
    batch_size: BatchSize,
    device: str | torch.device,
    report: Callable[[int], object],
) -> list[Reference]:
    """The reference as each extractor sees it; `chosen`: (count,) 1 for images of the target."""
    content = hashlib.sha256()
    collectors = [ReferenceCollector(one, None if chosen is None else 1, num_pairwise) for one in extractors]
    for first, chunk in numbered(reference, reference.count):
        labels = None if chosen is None else chosen[first : first + len(chunk)]
        for collector, extractor in zip(collectors, extractors, strict=True):
            collector.add(_features(extractor, chunk, batch_size), labels)
        for one in chunk:
            content.update(np.ascontiguousarray(one))
        report(first + len(chunk))
    described = f"{reference.path}, sha256 {content.hexdigest()[:12]}"
    return [one.finish(described=described, device=device) for one in collectors]


def _check_sides(samples: Side, reference: Side, num_samples: int | None) -> None:
    if num_samples is not None and num_samples > samples.count:
        raise DataError(f"--num-samples: {num_samples}, but {samples.path} holds {samples.count}")
    for what, side, count in (("samples", samples, num_samples or samples.count), ("reference", reference, None)):
        if (count or side.count) <= DENSITY_K:
            raise DataError(f"{side.path}: {count or side.count} {what}; an evaluation needs {DENSITY_K + 1} or more")
    if (samples.features is None) != (reference.features is None):
        first, second = (samples, reference) if reference.features is None else (reference, samples)
        raise DataError(f"{first.path} holds features, {second.path} images: they cannot be compared")
    if samples.channels and reference.channels and samples.channels != reference.channels:
        raise DataError(
            f"{samples.path} has {samples.channels} channels, {reference.path} {reference.channels}: they cannot be"
            " compared"
        )


def _require_labels(reference: Side) -> None:
    if reference.labels is None:
        raise DataError(
            f"--target: {reference.path} has no labels; give --reference-labels, or a folder per class below it"
        )


def target_images(reference: Side, target: str, judge: Classifier | None, aim: int | None) -> np.ndarray:
    """(reference.count,) int: 1 for images of the target, which labels may give by name or by the judge's number.

    Raises:
        DataError: too few of them.
    """
    names = sorted(set(reference.labels.tolist()))
    ways = [target]
    if aim is not None:
        ways += [str(aim), *([judge.classes[aim]] if judge.classes is not None else [])]
    way = next((way for way in ways if way in names), target)
    chosen = (reference.labels == way).astype(int)
    if chosen.sum() <= DENSITY_K:
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise DataError(
            f"--target: {reference.path} holds {chosen.sum()} of the class {target!r}, {DENSITY_K + 1} or more are"
            f" needed; its labels: {listed}"
        )
    return chosen


def _check_given(samples: Side, reference: Side, features: Sequence[str], classifier: str | None) -> None:
    if list(features) not in (["auto"], [GIVEN]):
        raise DataError(f"--features {' '.join(features)}: {samples.path} holds features already; leave it out")
    if classifier is not None:
        raise DataError(f"--classifier: {samples.path} holds features, which it cannot classify")
    ours, theirs = samples.features.shape[1], reference.features.shape[1]
    if ours != theirs:
        raise DataError(
            f"{samples.path} holds features of {ours} dimensions, {reference.path} of {theirs}: they cannot be compared"
        )


def _class_of(judge: Classifier, target: str) -> int:
    """The target among the classifier's classes, by name or number."""
    if judge.classes is not None:
        return class_index(judge.classes, target)
    if target.isdecimal():
        return int(target)
    raise DataError(f"--target: {target!r}: the classifier's classes have no names; give a number")


def chosen_protocols(
    features: Sequence[str], weights_dir: str | Path, judge: Classifier | None, flag: str = "--classifier"
) -> list[str]:
    """The protocols that `features` names, the headline first; `judge` under auto only where there is one.

    Raises:
        DataError: features that images do not have, or those of a judge that the `flag` does not give.
    """
    if GIVEN in features:
        raise DataError("--features given: both sides must be .npy files of (N, dim) floating-point features")
    if "judge" in features and judge is None:
        raise DataError(f"--features judge: give the judge by {flag}")
    found = [one for one in resolve_features(features, weights_dir) if one != "judge" or judge is not None]
    return found or ["inception"]  # fetched, or refused with what to do


def _features(extractor: Extractor | Given, images: ImageList | np.ndarray, batch_size: BatchSize) -> np.ndarray:
    """(n, dim) features of images of any sizes; of features, themselves."""
    if isinstance(extractor, Given):
        return np.asarray(images)
    channels = getattr(extractor, "channels", None)
    return _by_shape(
        images, channels, batch_size, f"features {extractor.name}", lambda some: extract(extractor, some, len(some))
    )


def _logits(judge: Classifier, images: ImageList, batch_size: BatchSize) -> np.ndarray:
    return _by_shape(images, judge.channels, batch_size, "the classifier", lambda some: predict(judge, some))


def _by_shape(
    images: ImageList,
    channels: int | None,
    batch_size: BatchSize,
    what: str,
    work: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """work((n, H, W, C)) -> (n, D) on images of equal shape together, the rows in the images' order."""
    size = AUTO_BATCH if batch_size == "auto" else batch_size
    places: dict[tuple[int, ...], list[int]] = {}
    images = [with_channels(image, channels) for image in images]
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    result = None
    for shape, at in places.items():
        stacked = np.stack([images[place] for place in at])
        try:
            rows = np.concatenate(
                in_batches(len(at), size, lambda batch, stacked=stacked: work(stacked[batch.start : batch.stop]))
            )
        except DataError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{what}: fails on images of shape {shape} ({reason}); try --image-size") from error
        if result is None:
            result = np.empty((len(images), rows.shape[1]), rows.dtype)
        result[at] = rows
    return result


def _warnings(extractors: Sequence[Extractor | Given], row: dict, vectors: np.ndarray) -> list[str]:
    sides = {"samples": "num_samples", "reference": "num_reference", "reference of the target": "num_reference_target"}
    found = []
    if (different := len({one.tobytes() for one in vectors})) < len(vectors):
        found.append(f"samples: of {len(vectors)} images {different} differ; copies make every interval too narrow")
    for side, column in sides.items():
        if 0 < row[column] < FEW:
            found.append(f"{side}: {row[column]} images are few, the intervals are rough")
        for extractor in extractors:
            if row[column] and (warning := rank_warning(row[column], extractor.dim)):
                found.append(f"{side}, {extractor.name}: {warning}")
    return found
