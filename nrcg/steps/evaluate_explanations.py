"""Metrics of one way to explain, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrcg import tracking
from nrcg.classifiers.storage import open_classifier
from nrcg.config import ROLES, EvaluateExplanationsStep
from nrcg.csv_files import write_csv
from nrcg.data.arrays import open_split
from nrcg.errors import DataError
from nrcg.evaluation.features import load_extractor
from nrcg.explain.explanations import Explanations
from nrcg.explain.metrics import evaluate_explanations
from nrcg.explain.perceptual import Perceptual
from nrcg.explain.repeats import NOISED
from nrcg.files import atomic_save_arrays, load_arrays
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.layout import REFERENCE_CACHE
from nrcg.steps.common import checked_data
from nrcg.steps.explain_shard import choose_images
from nrcg.steps.likelihood import image_bits
from nrcg.steps.reference import open_references

SHOWN = 16
"""Explanations kept for the picture."""


def measure_explanations(
    settings: EvaluateExplanationsStep,
    *,
    shards: Sequence[Path],
    data: Path,
    ddpm: Path,
    classifiers: Path,
    out: Path,
    device: torch.device,
    cache: Path = Path(REFERENCE_CACHE),
) -> list[dict[str, Any]]:
    """A row of metrics for each pair of classes: by the guide, and by the classifiers that did not guide.

    Args:
        settings: The way's settings.
        shards: What `explain_shard` wrote, in order.
        data: Folder of the data set.
        ddpm: Folder of the diffusion model.
        classifiers: Folder of the classifiers.
        out: The table; the first images stand beside it (.npz).
        device: Device that computes.
        cache: Folder of the references.

    Returns:
        The rows.

    Raises:
        DataError: A shard is damaged.
    """
    manifest, how = checked_data(data), settings.how
    models = {role: open_classifier(classifiers / role).to(device) for role in ROLES}
    guide = models[how.classifier]
    _, labels = open_split(data, "val")
    chosen = choose_images(settings, labels, guide.classes)
    runs = _read(shards, guide.classes, how.kind, len(chosen.rows))
    noised, found = runs.pop(NOISED, None), list(runs.values())
    same, bits = _same(settings, models, device), None
    if settings.explain.bits:
        pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device)
        bits = image_bits(pipe, found[0].images, settings.explain.seed)
    rows = []
    params = settings.model_dump(exclude={"explain"})
    tags = {"explainer": settings.explainer, "dataset": manifest["name"]}
    with tracking.run(
        settings.experiment, f"explain {settings.explainer}", kind="explain", params=params, tags=tags, deferred=True
    ) as run:
        for number, pair in enumerate(chosen.pairs):
            places = chosen.pair == number
            target = guide.classes[int(chosen.targets[places][0])]
            aimed = settings.model_copy(update={"target": target})
            extractors, references = open_references(aimed, data, manifest, models["judge"], cache, device)
            own = found[0].take(places)
            if own.skipped.all():
                rows.append({"method": settings.explainer, "pair": pair} | _nothing(own))
                continue
            row = evaluate_explanations(
                own,
                **same,
                extractors=extractors,
                references=references,
                labels=labels[chosen.rows[places]],
                bits_per_dim=None if bits is None else bits[places],
                seeds=[one.take(places) for one in found[1:]],
                noised=None if noised is None else noised.take(places),
            )
            rows.append({"method": settings.explainer, "pair": pair} | row)
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            run.log_metrics({k: v for k, v in numbers.items() if np.isfinite(v)} | {"pair": number}, step=number)
        run.log_artifact(_write(out, rows, found[0]))
    return rows


def _same(settings: EvaluateExplanationsStep, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, Any]:
    """What `evaluate_explanations` takes for every pair alike."""
    config, guide, folder = settings.explain, settings.how.classifier, settings.evaluation.inception_dir
    return {
        "guide": models[guide],
        "judges": {role: model for role, model in models.items() if role != guide},
        "identities": [
            load_extractor(one, weights_dir=folder, judge=models["judge"], device=device) for one in config.identities
        ],
        "identity_threshold": config.identity_threshold,
        "perceptual": Perceptual(),
    }


def _nothing(found: Explanations) -> dict[str, Any]:
    """A row without metrics, where the guide calls every image the class aimed at already."""
    counts = {"kind": found.kind, "num_images": len(found), "num_skipped": len(found), "num_nonfinite": 0}
    return counts | {"validity": float("nan"), "l1": float("nan"), "missing": "all: every image was skipped"}


def _write(out: Path, rows: list[dict[str, Any]], found: Explanations) -> Path:
    write_csv(out, rows, list(dict.fromkeys(column for row in rows for column in row)))
    shown = found.take(slice(0, SHOWN))
    pictures = {"originals": shown.originals, "images": shown.images, "succeeded": shown.succeeded}
    atomic_save_arrays(out.with_suffix(".npz"), pictures)
    return out


def _read(shards: Sequence[Path], classes: list[str], kind: str, count: int) -> dict[str, Explanations]:
    """The explanations of all shards, `count` for each run: seeds 0, 1, ..., and NOISED where there is one."""
    parts: dict[str, list[Explanations]] = {}
    for path in shards:
        runs: dict[str, dict[str, np.ndarray]] = {}
        for name, array in load_arrays(path).items():
            run, dot, field = name.partition(".")
            if dot:
                runs.setdefault(run, {})[field] = array
        try:
            for run, own in runs.items():
                parts.setdefault(run, []).append(Explanations.from_arrays(own, classes, kind))
        except KeyError as error:
            raise DataError(f"damaged ({error})", path) from None
    found = {run: Explanations.join(own) for run, own in parts.items()}
    for one in found.values():
        if len(one) != count:
            raise DataError(f"{len(one)} explanations where {count} are asked for; delete them", shards[0])
    return found
