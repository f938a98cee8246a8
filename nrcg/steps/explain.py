"""Explanations of a classifier's decisions about images: pictures, a table and a page, kept part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrcg.batching import BatchSize
from nrcg.config import Compile, fingerprint
from nrcg.config.explaining import ExplainSettings
from nrcg.devices import device_name
from nrcg.errors import DataError
from nrcg.evaluation.features import ClassifierExtractor, Extractor, load_extractor, weights_digest
from nrcg.evaluation.references import Reference
from nrcg.evaluation.sides import Side, in_parts
from nrcg.explain.engine import aims_of, work_of
from nrcg.explain.explanations import Explanations
from nrcg.explain.metrics import VERIFIED, evaluate_explanations
from nrcg.explain.perceptual import Perceptual
from nrcg.explain.repeats import NOISED, Repeat, repeats_of
from nrcg.files import atomic_save_arrays, load_arrays
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.provenance import versions
from nrcg.steps.explain_files import write_explanations
from nrcg.steps.explain_reference import RealImages, checked_features, read_reference
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

    @property
    def judge(self) -> nn.Module | None:
        """The first one."""
        return next(iter(self.judges.values()), None)


@dataclass(frozen=True)
class Measures:
    """What is measured of explanations beside what the models say.

    Attributes:
        num_seeds: Explanations of each image, by the settings' seed and the next ones.
        noise: Standard deviation, as a share of the range of pixel values, of the noise that the images are explained
            with once more; 0: they are not.
        bits: Whether to measure bits per dimension of the explanations.
        real: Real images to compare with, or None.
        identities: Protocols or SPECs of networks whose features say whose picture it is.
        identity_threshold: Cosine above which two pictures show the same.
        weights_dir: Folder of the Inception weights, for `identities`.
    """

    num_seeds: int = 1
    noise: float = 0.0
    bits: bool = False
    real: RealImages | None = None
    identities: Sequence[str] = ()
    identity_threshold: float = VERIFIED
    weights_dir: str | Path = "weights"


@dataclass(frozen=True)
class Explained:
    """What a run made.

    Attributes:
        explanations: All of them, by the first seed.
        metrics: The row of `evaluate_explanations`; None where every image was skipped.
        notes: What was skipped, not measured or looks odd, a line each.
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
    measures: Measures | None = None,
    batch_size: BatchSize = "auto",
    precision: torch.dtype = torch.float32,
    compile: Compile = "off",
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
        measures: What is measured; None: what needs no more than the models.
        batch_size, precision, compile: As of the pipeline's call.
        record: What explanations.json says beside what is known here.

    Raises:
        DataError: Images that do not fit the model, or the other ones.
        ValueError: A target or a setting that does not fit.
    """
    measures = measures or Measures()
    features = _Features.of(pipe, models, measures, settings.kind, target)
    count = min(num_images or images.count, images.count)
    repeats = repeats_of(settings, measures.num_seeds, measures.noise)
    work, runs = work_of(settings, pipe) * count, {}
    run = {"batch_size": batch_size, "precision": precision, "compile": compile}
    known = _identity(pipe, models, target, precision)
    with Progress(f"explain {settings.kind}", work * len(repeats), "step") as bar:
        for place, repeat in enumerate(repeats):
            key = fingerprint(known | {"settings": asdict(repeat.settings), "noise": repeat.noise})
            folder = out / "parts" / (repeat.name if place else "")
            runs[repeat.name] = _in_kept_parts(
                *(pipe, models, images, repeat, count, target, run, folder, key),
                report=lambda done, place=place: bar.set(place * work + done),
            )
    whole, labels = runs["0"], _labels(images, runs["0"])
    metrics = None if whole.skipped.all() else _measured(pipe, models, runs, labels, measures, features)
    notes = [*_notes(whole, labels), *features.notes]
    said = {**(record or {}), **_record(pipe, settings, target, precision, measures)}
    write_explanations(out, whole, _other_seeds(runs), images, models.judges, metrics, said, notes)
    return Explained(whole, metrics, notes)


@dataclass(frozen=True)
class _Features:
    """What explanations are measured in."""

    extractors: Sequence[Extractor]
    references: Sequence[Reference]
    identities: Sequence[Extractor]
    notes: list[str]

    @classmethod
    def of(
        cls, pipe: GuidedDDPMPipeline, models: Explainers, measures: Measures, kind: str, target: str | None
    ) -> _Features:
        """Before anything is explained, so that a mistake costs nothing."""
        judge, shape = models.judge, pipe.image_shape()
        if judge is None and "judge" in measures.identities:
            raise DataError("--identity judge: give the judge by --judge")
        identities = [
            load_extractor(one, weights_dir=measures.weights_dir, judge=judge, device=pipe.device)
            for one in measures.identities
        ]
        for one in identities:
            checked_features(one, np.zeros((1, *shape[1:], shape[0]), np.uint8))
        if measures.real is None:
            return cls([] if judge is None else [ClassifierExtractor(judge)], [], identities, [])
        extractors, references, notes = read_reference(
            measures.real, shape, guide=models.guide, judge=judge, kind=kind, target=target, device=pipe.device
        )
        return cls(extractors, references, identities, notes)


def _in_kept_parts(
    pipe: GuidedDDPMPipeline,
    models: Explainers,
    images: Side,
    repeat: Repeat,
    count: int,
    target: str | None,
    run: Mapping[str, Any],
    folder: Path,
    known: str,
    report: Any,
) -> Explanations:
    """The explanations of one run, part by part; each that is done is kept in the folder."""
    per_image, parts = work_of(repeat.settings, pipe), []
    for first, originals in in_parts(images, count, PART, pipe.image_shape()):
        path = folder / f"part{first // PART:05d}.npz"
        key = f"{known}-{hashlib.sha256(np.ascontiguousarray(originals)).hexdigest()[:16]}"
        part = _read_part(path, key, models.guide, repeat.settings)
        if part is None:
            part = repeat.explain(
                pipe,
                models.guide.to(pipe.device),
                originals,
                aims_of(models.guide, originals, target, repeat.settings.kind),
                robust=models.robust,
                samples=range(first, first + len(originals)),
                on_step=lambda done, first=first: report(first * per_image + done),
                **run,
            )
            atomic_save_arrays(path, part.arrays() | {"known": np.array(key)})
        parts.append(part)
        report((first + len(originals)) * per_image)
    return Explanations.join(parts)


def _measured(
    pipe: GuidedDDPMPipeline,
    models: Explainers,
    runs: Mapping[str, Explanations],
    labels: np.ndarray | None,
    measures: Measures,
    features: _Features,
) -> dict[str, float | str]:
    whole = runs["0"]
    return evaluate_explanations(
        whole,
        guide=models.guide,
        judges=models.judges,
        extractors=features.extractors,
        references=features.references,
        identities=features.identities,
        identity_threshold=measures.identity_threshold,
        labels=labels,
        bits_per_dim=image_bits(pipe, whole.images) if measures.bits else None,
        seeds=_other_seeds(runs),
        noised=runs.get(NOISED),
        perceptual=Perceptual(),
    )


def _other_seeds(runs: Mapping[str, Explanations]) -> list[Explanations]:
    """The runs by further seeds."""
    return [one for name, one in runs.items() if name not in ("0", NOISED)]


def _identity(
    pipe: GuidedDDPMPipeline, models: Explainers, target: str | None, precision: torch.dtype
) -> dict[str, Any]:
    """What decides the explanations of every run, beside the run's settings and the images."""
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "target": target,
        "precision": str(precision),
        "scheduler": [type(pipe.scheduler).__name__, json.loads(json.dumps(scheduler, default=str))],
        "unet": weights_digest(pipe.unet),
        "guide": weights_digest(models.guide),
        "robust": None if models.robust is None else weights_digest(models.robust),
    }


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


def _record(
    pipe: GuidedDDPMPipeline, settings: ExplainSettings, target: str | None, precision: torch.dtype, measures: Measures
) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "target": target,
        "num_seeds": measures.num_seeds,
        "noise": measures.noise,
        "precision": str(precision).removeprefix("torch."),
        "device": device_name(pipe.device),
        "versions": versions(),
    }
