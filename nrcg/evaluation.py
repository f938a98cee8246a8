"""Evaluation of one method's samples over its scales: accuracies and distances to the training images."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg import metrics, tracking
from nrcg.classifiers import Classifier, class_index, load_classifier, read_classifier_config
from nrcg.config import EvaluateStep, format_scale
from nrcg.datasets import load_manifest, open_split, to_unit
from nrcg.errors import DataError
from nrcg.features import Extractor, InceptionExtractor, JudgeExtractor, extract, resolve_features
from nrcg.figures import sample_grid, save_png
from nrcg.files import sha256_file
from nrcg.progress import Progress

GRID_SAMPLES = 64
RECORD_KEYS = {"first_sample", "nonfinite", "seconds", "peak_memory_mib", "sha256"}


@dataclass(frozen=True)
class SampleSet:
    """Samples of one method and scale, joined from its shards.

    Attributes:
        images: (N, H, W, C) uint8.
        nonfinite: samples that turned non-finite.
        images_per_second: over all shards.
        peak_memory_mib: the largest shard's.
    """

    images: np.ndarray
    nonfinite: int
    images_per_second: float
    peak_memory_mib: float


def setting_folder(samples: Path, method: str, scale: float) -> Path:
    return samples / method / f"scale{format_scale(scale)}"


def read_samples(folder: Path, num_samples: int) -> SampleSet:
    """Join the shards of a setting, checked against their records.

    Args:
        num_samples: expected; shards past them, left by an earlier and larger run, are not read.

    Raises:
        DataError: a shard or its record is missing, damaged or does not belong to the other.
    """
    paths = sorted(folder.glob("shard*.npy"))
    if not paths:
        raise DataError(f"{folder}: holds no shard*.npy; run: snakemake --cores all --resources gpu=1")
    parts, records = [], []
    for path in paths:
        if sum(map(len, parts)) >= num_samples:
            break
        remedy = f"delete it, then run: snakemake --cores all --resources gpu=1 {path}"
        try:
            record = json.loads(path.with_suffix(".json").read_text())
            if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
                raise ValueError("a key is missing")
            images = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: damaged or without its .json ({error}); {remedy}") from None
        if record["sha256"] != sha256_file(path):
            raise DataError(f"{path}: is not what its .json says (checksum); {remedy}")
        parts.append(images)
        records.append(record)
    firsts = [record["first_sample"] for record in records]
    expected = np.cumsum([0, *(len(part) for part in parts[:-1])]).tolist()
    if firsts != expected:
        raise DataError(f"{folder}: its shards begin at samples {firsts}, expected {expected}; delete the folder")
    images = np.concatenate(parts)
    if len(images) != num_samples:
        raise DataError(f"{folder}: its shards hold {len(images)} samples, expected {num_samples}; delete the folder")
    seconds = sum(record["seconds"] for record in records)
    return SampleSet(
        images=images,
        nonfinite=sum(record["nonfinite"] for record in records),
        images_per_second=len(images) / seconds,
        peak_memory_mib=max(record["peak_memory_mib"] for record in records),
    )


def choose_extractor(features: str, inception_dir: str, judge: Classifier, device: torch.device) -> Extractor:
    """`inception`, `judge`, or `auto`: Inception where its weights are at hand."""
    if resolve_features(features, inception_dir) == "inception":
        return InceptionExtractor(inception_dir, device=str(device))
    return JudgeExtractor(judge)


def target_accuracy(classifier: Classifier, images: np.ndarray, target: int, device: torch.device) -> float:
    """Share of images (N, H, W, C) uint8 that the classifier takes for the target class."""
    logits = []
    with torch.no_grad():
        for first in range(0, len(images), 256):
            logits.append(classifier(to_unit(images[first : first + 256]).to(device)).float().cpu())
    return metrics.target_share(torch.cat(logits).numpy(), target)


def evaluate_method(
    settings: EvaluateStep, samples: Path, data: Path, classifiers: Path, scales: list[float], device: torch.device
) -> tuple[list[dict], list[str]]:
    """Metrics of a method's samples at each scale, logged as one tracking run per scale.

    `accuracy_guide` is graded by the classifier that guided (self-graded), by the non-robust one where none did;
    `accuracy_judge` by the judge, which never guides.

    Args:
        samples: results/<experiment>/samples.
        data: data/<dataset>.
        classifiers: models/<experiment>/classifiers.

    Returns:
        A row per scale and the columns' names.
    """
    judge = load_classifier(classifiers / "judge").to(device)
    guide = load_classifier(classifiers / (settings.guidance.classifier or "non_robust")).to(device)
    target = class_index(read_classifier_config(classifiers / "judge")["classes"], settings.target)
    config = settings.evaluation
    extractor = choose_extractor(config.features, config.inception_dir, judge, device)
    images, labels = open_split(data, "train")
    count = len(images) if config.num_reference is None else min(config.num_reference, len(images))
    manifest = load_manifest(data)
    rows = []
    with Progress(f"evaluate {settings.method}", count + len(scales), "image") as bar:
        reference = extract(extractor, images[:count], progress=lambda done, _: bar.set(done))
        for scale in scales:
            drawn = read_samples(setting_folder(samples, settings.method, scale), settings.sampling.num_samples)
            row = {
                "experiment": settings.experiment,
                "method": settings.method,
                "scale": scale,
                "num_samples": len(drawn.images),
                "accuracy_guide": target_accuracy(guide, drawn.images, target, device),
                "accuracy_judge": target_accuracy(judge, drawn.images, target, device),
            }
            found = extract(extractor, drawn.images)
            row |= metrics.evaluate_samples(found, reference, labels[:count], target, extractor.name, seed=0)
            row |= {
                "nonfinite": drawn.nonfinite,
                "images_per_second": drawn.images_per_second,
                "peak_memory_mib": drawn.peak_memory_mib,
            }
            row["mlflow_run_id"] = _log(settings, row, drawn.images, extractor, manifest, count)
            rows.append(row)
            bar.update()
    warning = metrics.rank_warning(min(row["num_samples"] for row in rows), extractor.dim)
    if warning:
        print(warning)
    return rows, list(rows[0])


def _log(
    settings: EvaluateStep, row: dict, images: np.ndarray, extractor: Extractor, manifest: dict, num_reference: int
) -> str:
    """One tracking run per method and scale; returns its id."""
    params = {
        "scale": row["scale"],
        "method": settings.method,
        "target": settings.target,
        "features": extractor.name,
        "num_reference": num_reference,
        "sampling": settings.sampling.model_dump(),
        "guidance": settings.guidance.model_dump(),
    }
    name = f"{settings.method} scale {format_scale(row['scale'])}"
    tags = {"dataset": manifest["name"], "method": settings.method}
    with tracking.run(settings.experiment, name, kind="sample", params=params, tags=tags) as run:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "scale"}
        run.log_metrics(numbers, step=tracking.scale_step(row["scale"]))
        with tempfile.TemporaryDirectory() as folder:
            save_png(Path(folder) / "samples.png", sample_grid(images[:GRID_SAMPLES], 8))
            run.log_artifact(Path(folder) / "samples.png")
        return run.id
