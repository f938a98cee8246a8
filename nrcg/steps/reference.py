"""What every method is compared with: features of the training images, and how good the classifiers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import ROLES, EvaluateStep, ReferenceStep
from nrcg.data.arrays import open_split
from nrcg.errors import DataError
from nrcg.evaluation.evaluate import classifier_quality
from nrcg.evaluation.features import Extractor, load_extractor, resolve_features
from nrcg.evaluation.frechet import rank_warning
from nrcg.evaluation.references import Reference, cached_reference, make_reference
from nrcg.files import read_record, write_record
from nrcg.layout import REFERENCE_CACHE
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import checked_data


def open_references(
    settings: ReferenceStep | EvaluateStep,
    data: Path,
    manifest: dict,
    judge: Classifier,
    cache: Path,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> tuple[list[Extractor], list[Reference]]:
    """The configured protocols, and the training images as each of them sees them: from the cache, else made.

    The images of the target class in the validation split are what diversity is held against.
    """
    config = settings.evaluation
    target = class_index(judge.classes, settings.target)
    images, labels = open_split(data, "train")
    held_out, held_out_labels = open_split(data, "val")
    count = len(images) if config.num_reference is None else min(config.num_reference, len(images))
    sums = {split: manifest["splits"][split]["sha256"]["images"] for split in ("train", "val")}
    described = (
        f"{manifest['name']}, training images 0..{count - 1}, class {settings.target}, sha256 {sums['train'][:12]}"
    )
    extractors, references = [], []
    for spec in resolve_features(config.features, config.inception_dir):
        extractor = load_extractor(spec, weights_dir=config.inception_dir, judge=judge, device=device)
        extractors.append(extractor)

        def make(extractor: Extractor = extractor) -> Reference:
            return make_reference(
                extractor,
                images[:count],
                labels[:count],
                target,
                held_out=held_out[held_out_labels == target],
                num_pairwise=config.num_pairwise,
                described=described,
                device=device,
                progress=lambda done, _: progress(done),
            )

        key = {
            "name": extractor.name,
            "protocol": extractor.protocol,
            "images": described,
            "sha256": sums,
            "labels": manifest["splits"]["train"]["sha256"]["labels"],
            "target": target,
            "num_pairwise": config.num_pairwise,
        }
        references.append(cached_reference(cache, key, make))
    return extractors, references


def describe_reference(
    settings: ReferenceStep,
    *,
    data: Path,
    classifiers: Path,
    out: Path,
    device: torch.device,
    cache: Path = Path(REFERENCE_CACHE),
) -> dict[str, object]:
    """Make what every method is compared with, and write what it is.

    Args:
        settings: The experiment's settings.
        data: data/<dataset>.
        classifiers: models/<experiment>/classifiers.
        out: reference.json.
        device: Device that computes.
        cache: Folder that the features are kept in.

    Returns:
        The record: `protocols`, a dict per protocol; `classifiers`, role -> `classifier_quality` on the validation
        images.
    """
    manifest = checked_data(data)
    images, labels = open_split(data, "val")
    loaded = {role: open_classifier(classifiers / role).to(device) for role in ROLES}
    with Progress(f"reference {settings.experiment}", manifest["splits"]["train"]["num_images"], "image") as bar:
        extractors, references = open_references(settings, data, manifest, loaded["judge"], cache, device, bar.set)
    for extractor, reference in zip(extractors, references, strict=True):
        if reference.target is not None:
            warn_of_rank(f"{extractor.name}, target class", reference.target.statistics.n, extractor.dim)
    record = {
        "protocols": [{"name": one.name, "dim": one.everything.statistics.dim, **one.identity} for one in references],
        "classifiers": {role: classifier_quality(one, images, labels) for role, one in loaded.items()},
    }
    write_record(out, record)
    return record


def read_reference_record(path: Path) -> dict:
    """reference.json as `describe_reference` made it. Raises DataError when it is missing or damaged."""
    try:
        record = read_record(path)
        for role in ROLES:
            if len(record["classifiers"][role]["ece"]) != 3 or len(record["classifiers"][role]["clean_accuracy"]) != 3:
                raise ValueError("not [value, lo, hi]")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"no record of the references ({error})", path) from None


def warn_of_rank(what: str, count: int, dim: int) -> None:
    """Print a line where there are too few images for a covariance of full rank."""
    warning = rank_warning(count, dim)
    if warning:
        print(f"{what}: {warning}", flush=True)
