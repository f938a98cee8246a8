"""Explanations of a classifier's decisions about images: pictures, a table and a page, kept part by part."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrcg.batching import BatchSize
from nrcg.config import Compile, fingerprint
from nrcg.config.explaining import OWN_CLASS, ExplainSettings
from nrcg.csv_files import write_csv
from nrcg.data.pictures import save_png
from nrcg.devices import device_name
from nrcg.errors import DataError
from nrcg.evaluation.features import ClassifierExtractor, weights_digest
from nrcg.evaluation.sides import Side, in_parts
from nrcg.explain.engine import explain_images, work_of
from nrcg.explain.explanations import Explanations, probabilities
from nrcg.explain.metrics import CHANGED_LEVELS, evaluate_explanations
from nrcg.explain.page import difference_map, explanations_page
from nrcg.explain.perceptual import Perceptual
from nrcg.files import atomic_save_arrays, atomic_write_text, load_arrays
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.provenance import versions
from nrcg.steps.likelihood import image_bits

PART = 64
"""Images that are explained and kept at a time: a killed run goes on with the part that it was at."""


@dataclass(frozen=True)
class Explainers:
    """The models of a run.

    Attributes:
        guide: Classifier that is explained.
        robust: Robust classifier for the cone projection, or None.
        judges: Classifiers that never guide, by name.
    """

    guide: nn.Module
    robust: nn.Module | None = None
    judges: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Explained:
    """What a run made.

    Attributes:
        explanations: All of them.
        metrics: The row of `evaluate_explanations`; None where every image was skipped.
        notes: What was skipped or looks odd, a line each.
    """

    explanations: Explanations
    metrics: dict[str, float | str] | None
    notes: list[str]


def explain_side(
    pipe: GuidedDDPMPipeline,
    models: Explainers,
    images: Side,
    settings: ExplainSettings,
    *,
    out: Path,
    target: str | None = None,
    num_images: int | None = None,
    batch_size: BatchSize = "auto",
    precision: torch.dtype = torch.float32,
    compile: Compile = "off",
    bits: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Explained:
    """Explanations of images: explanations/ and differences/ with a PNG each, explanations.csv, .html and .json.

    Args:
        pipe: The diffusion model on its device, with the sampler that is wanted.
        models: The classifiers.
        images: Of the model's size (`open_side(..., image_size=...)`).
        settings: How they are made.
        out: Folder to write to; parts that are there, of the same models, settings and images, are taken.
        target: Class by name or number; None: as for `explain_images`.
        num_images: The first ones; None: all.
        batch_size, precision, compile: As of the pipeline's call.
        bits: Whether to measure bits per dimension of the explanations.
        record: What explanations.json says beside what is known here.

    Raises:
        DataError: Images that do not fit the model.
        ValueError: A target or a setting that does not fit.
    """
    count = min(num_images or images.count, images.count)
    known = _identity(pipe, models, settings, target, precision)
    per_image, parts = work_of(settings, pipe), []
    with Progress(f"explain {settings.kind}", count * per_image, "step") as bar:
        for first, originals in in_parts(images, count, PART, pipe.image_shape()):
            path = out / "parts" / f"part{first // PART:05d}.npz"
            key = f"{known}-{hashlib.sha256(np.ascontiguousarray(originals)).hexdigest()[:16]}"
            part = _read_part(path, key, models.guide, settings)
            if part is None:
                part = explain_images(
                    pipe,
                    models.guide,
                    originals,
                    target,
                    settings,
                    robust=models.robust,
                    samples=range(first, first + len(originals)),
                    batch_size=batch_size,
                    precision=precision,
                    compile=compile,
                    on_step=lambda done, first=first: bar.set(first * per_image + done),
                )
                atomic_save_arrays(path, part.arrays() | {"known": np.array(key)})
            parts.append(part)
            bar.set((first + len(originals)) * per_image)
    whole = Explanations.join(parts)
    labels = _labels(images, whole)
    metrics = None
    if not whole.skipped.all():
        metrics = _measure(pipe, whole, models, labels, bits)
    notes = _notes(whole, labels)
    _write(out, whole, images, models, metrics, {**(record or {}), **_record(pipe, settings, target, precision)}, notes)
    return Explained(whole, metrics, notes)


def _identity(
    pipe: GuidedDDPMPipeline,
    models: Explainers,
    settings: ExplainSettings,
    target: str | None,
    precision: torch.dtype,
) -> str:
    """Fingerprint of all that decides an explanation beside its image."""
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return fingerprint(
        {
            "settings": asdict(settings),
            "target": target,
            "precision": str(precision),
            "scheduler": [type(pipe.scheduler).__name__, json.loads(json.dumps(scheduler, default=str))],
            "unet": weights_digest(pipe.unet),
            "guide": weights_digest(models.guide),
            "robust": None if models.robust is None else weights_digest(models.robust),
        }
    )


def _read_part(path: Path, key: str, guide: nn.Module, settings: ExplainSettings) -> Explanations | None:
    """A part that an earlier run of the same explanations wrote; None: there is none that is whole."""
    try:
        arrays = load_arrays(path)
        if str(arrays["known"]) != key:
            return None
        return Explanations.from_arrays(arrays, getattr(guide, "classes", None), settings.kind)
    except (DataError, KeyError):
        return None


def _labels(images: Side, whole: Explanations) -> np.ndarray | None:
    """(N,) true classes by the guide's numbers; None where the images have no labels that it knows."""
    if images.labels is None:
        return None
    given = [str(label) for label in images.labels[: len(whole)]]
    names = whole.classes or [str(label) for label in range(whole.before.shape[1])]
    if not set(given) <= set(names):
        return None
    return np.array([names.index(label) for label in given], np.int64)


def _notes(whole: Explanations, labels: np.ndarray | None) -> list[str]:
    notes = []
    if whole.skipped.any():
        notes.append(f"{whole.skipped.sum()} of {len(whole)} images skipped: the guide calls them the target already")
    if whole.nonfinite.any():
        notes.append(f"{whole.nonfinite.sum()} of {len(whole)} explanations turned non-finite; they count as failures")
    if labels is not None and (wrong := int((whole.own != labels).sum())):
        notes.append(
            f"{wrong} of {len(whole)} images are called otherwise than their label; they are explained as called"
        )
    return notes


def _measure(
    pipe: GuidedDDPMPipeline, whole: Explanations, models: Explainers, labels: np.ndarray | None, bits: bool
) -> dict[str, float | str]:
    judge = next(iter(models.judges.values()), None)
    return evaluate_explanations(
        whole,
        judges=models.judges,
        extractor=None if judge is None else ClassifierExtractor(judge),
        labels=labels,
        bits_per_dim=image_bits(pipe, whole.images) if bits else None,
        perceptual=Perceptual(),
    )


def _record(
    pipe: GuidedDDPMPipeline, settings: ExplainSettings, target: str | None, precision: torch.dtype
) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "target": target,
        "precision": str(precision).removeprefix("torch."),
        "device": device_name(pipe.device),
        "versions": versions(),
    }


def explanation_rows(
    whole: Explanations, names: Sequence[str], judges: Mapping[str, np.ndarray]
) -> list[dict[str, object]]:
    """A line of explanations.csv for each explanation.

    Args:
        names: (N,) what each image is called.
        judges: Name to (N, K) probabilities of the explanations.
    """
    rows = []
    for place in range(len(whole)):
        target, own = whole.targets[place], whole.own[place]
        change = np.abs(whole.images[place].astype(int) - whole.originals[place])
        status = "flipped" if whole.succeeded[place] else "failed"
        if whole.kind in OWN_CLASS and whole.succeeded[place]:
            status = "kept"
        if whole.skipped[place]:
            status = "skipped"
        row: dict[str, object] = {
            "image": names[place],
            "from": whole.name(own),
            "target": whole.name(target),
            "found": whole.name(whole.found[place]),
            "status": status,
            "p_target_before": float(whole.before[place, target]),
            "p_target": float(whole.after[place, target]),
            "p_own_before": float(whole.before[place, own]),
            "p_own": float(whole.after[place, own]),
            "l1": float(change.mean() / 255),
            "changed": float((change.max(axis=2) > CHANGED_LEVELS).mean()),
            "largest_change": float(change.max() / 255),
            "tau": float(whole.tau[place]),
            "weight": float(whole.weight[place]),
            "seconds": float(whole.seconds[place]),
        }
        for name, probability in judges.items():
            row |= {f"p_target_{name}": float(probability[place, target])}
        rows.append(row)
    return rows


def _write(
    out: Path,
    whole: Explanations,
    images: Side,
    models: Explainers,
    metrics: dict[str, float | str] | None,
    record: dict[str, Any],
    notes: list[str],
) -> None:
    """The pictures, the table, the record and the page."""
    names = images.names or [f"{place:05d}" for place in range(len(whole))]
    for place, (original, image) in enumerate(zip(whole.originals, whole.images, strict=True)):
        save_png(out / "explanations" / f"{place:05d}.png", image)
        save_png(out / "differences" / f"{place:05d}.png", difference_map(original, image))
    rows = explanation_rows(
        whole, names, {name: probabilities(one, whole.images) for name, one in models.judges.items()}
    )
    write_csv(out / "explanations.csv", rows, list(rows[0]))
    plain = {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in (metrics or {}).items()
    }
    text = json.dumps(record | {"metrics": plain, "notes": notes}, indent=1, allow_nan=False, default=str)
    atomic_write_text(out / "explanations.json", text + "\n")
    settings = record["settings"]
    facts = {
        "images": images.path,
        **{key: record[key] for key in ("ddpm", "classifier", "robust") if record.get(key)},
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        **{f"note {number}": note for number, note in enumerate(notes, 1)},
    }
    for name in ("validity", *(f"validity_{judge}" for judge in models.judges), "l1", "changed"):
        if metrics is not None and name in metrics:
            facts[name] = f"{metrics[name]:.3f} ({metrics[f'{name}_lo']:.3f} to {metrics[f'{name}_hi']:.3f})"
    title = f"{len(whole)} {settings['kind']} explanations"
    atomic_write_text(out / "explanations.html", explanations_page(whole, rows, title=title, facts=facts))
