"""One training objective of a grid, measured: likelihood, samples, guidance, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nrcg import tracking
from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import ObjectiveStep
from nrcg.csv_files import read_csv, write_csv
from nrcg.data.arrays import open_split, to_unit
from nrcg.evaluation.evaluate import evaluate_images, with_error, with_interval
from nrcg.files import atomic_save_arrays, weights_sha256, write_record
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.sensitivity import DENOISED, forward_analysis
from nrcg.layout import REFERENCE_CACHE, format_scale
from nrcg.pipeline.progress import Progress
from nrcg.report.columns import frechet_columns
from nrcg.steps.common import checked_data, data_tags
from nrcg.steps.likelihood import Measure, measure_images
from nrcg.steps.likelihood_table import mean_and_error, row_of
from nrcg.steps.reference import open_references
from nrcg.steps.sample import draw, method_drawing, method_guidance

SHOWN = 8
"""Samples kept of each setting, for the picture."""


def measure_objective(
    settings: ObjectiveStep,
    *,
    data: Path,
    ddpm: Path,
    classifiers: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
    cache: Path = Path(REFERENCE_CACHE),
) -> dict[str, Any]:
    """What a diffusion model trained by one objective is good for.

    Args:
        settings: The objective's settings.
        data: Folder of the data set.
        ddpm: Folder of the diffusion model that was trained by the objective.
        classifiers: Folder of the classifiers.
        out: The record; the numbers by t (.csv) and the first samples (.npz) stand beside it.
        device: Device that computes.
        precision: Autocast of the U-Net.
        cache: Folder of the references.

    Returns:
        The record: `row` of the table; `settings` of the guidance scales, one row each.
    """
    name, config = settings.objective, settings.objectives.cells[settings.objective]
    manifest = checked_data(data)
    pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device).with_weights(settings.unet_weights)
    role = settings.guidance.classifier
    judge, guide = (open_classifier(classifiers / one).to(device) for one in ("judge", role))
    params = settings.model_dump(exclude={"objectives"}) | {"weights_sha256": weights_sha256(ddpm)}
    tags = {"objective": name, **data_tags(manifest)}
    with tracking.run(
        settings.experiment, f"objective {name}", kind="objective", params=params, tags=tags, deferred=True
    ) as run:
        row: dict[str, Any] = {"objective": name, "predicts": config.predicts, "weighting": config.weighting}
        row |= _training(ddpm)
        bits, by_t = _likelihood(settings, pipe, data, precision)
        smooth, sensitivity = _sensitivity(settings, pipe, guide, data, precision)
        images, rows = _samples(settings, pipe, (judge, guide), data, manifest, precision, cache)
        row |= bits | smooth | _of_samples(rows)
        for line, change in zip(by_t[1:], sensitivity, strict=True):
            line["gradient_sensitivity"] = change
        write_csv(out.with_suffix(".csv"), by_t, list(by_t[1]))
        atomic_save_arrays(out.with_suffix(".npz"), {"unconditional": images[0], "guided": images[_best(rows)]})
        run.log_metrics({key: value for key, value in row.items() if isinstance(value, float)})
        run.log_artifact(out.with_suffix(".csv"))
        record = {"row": row, "scales": rows[1:], "settings": settings.fingerprint(), "mlflow_run_id": run.id}
        write_record(out, record)
    return record


def _training(ddpm: Path) -> dict[str, float]:
    """The last epoch of the training. Its validation loss is the noise's squared error, whatever was learned."""
    last = read_csv(ddpm / "training.csv", ("step", "val_loss", "images_per_second"))[-1]
    return {"training_steps": float(last["step"]), "val_loss": float(last["val_loss"])}


def _likelihood(
    settings: ObjectiveStep, pipe: GuidedDDPMPipeline, data: Path, precision: torch.dtype
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Bits per dimension of validation images, with their interval; and by t the terms and errors."""
    images, _ = open_split(data, "val")
    config = settings.likelihood
    how = Measure.of(config, min(config.num_images, len(images)), precision)
    found = measure_images(pipe, to_unit(images[: how.num_images]), how)
    unit = math.prod(pipe.image_shape()) * math.log(2)
    columns = with_error("bits_per_dim", *mean_and_error(found["nats"] / unit))
    if "flow" in found:
        columns |= with_error("flow_bits_per_dim", *mean_and_error(found["flow"]))
    kept = ("t", "bits_per_dim", "mse_eps", "mse_x0")
    rows = (row_of(t, found, unit) for t in range(found["terms"].shape[1]))
    by_t = [{name: row[name] for name in kept} for row in rows]
    return columns, by_t


def _sensitivity(
    settings: ObjectiveStep, pipe: GuidedDDPMPipeline, guide: Classifier, data: Path, precision: torch.dtype
) -> tuple[dict[str, float], list[float]]:
    """Gradient sensitivity through x0hat (eq. 6), the mean over t = 1..T, and by t.

    The interval takes the deviations at all t for one image's, so that it is rather too wide.
    """
    config = settings.forward
    images, labels = open_split(data, "val")
    count = min(config.num_images, len(images))
    with Progress(f"objective {settings.objective}: gradients", count * pipe.schedule().num_steps, "step") as bar:
        rows = forward_analysis(
            to_unit(images[:count]).to(pipe.device),
            torch.from_numpy(labels[:count]).to(pipe.device),
            classifiers={"non_robust": guide},
            predict_noise=pipe.noise_predictor(precision),
            schedule=pipe.schedule(),
            stabilizers={},
            target=class_index(guide.classes, settings.target),
            seed=config.seed,
            batch_size=config.batch_size,
            clip_pred_x0=settings.sampling.clip_pred_x0,
            noise=config.noise,
            on_step=bar.set,
        )
    own = [row for row in rows if row["method"] == DENOISED]
    mean, deviation = (np.array([row[f"gradient_sensitivity_{key}"] for row in own]) for key in ("mean", "std"))
    error = float(deviation.mean() / count**0.5)
    return with_error("gradient_sensitivity", float(mean.mean()), error), mean.tolist()


def _samples(
    settings: ObjectiveStep,
    pipe: GuidedDDPMPipeline,
    models: tuple[Classifier, Classifier],
    data: Path,
    manifest: dict,
    precision: torch.dtype,
    cache: Path,
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The first samples and the metrics: without guidance, then at each scale."""
    judge, guide = models
    pipe.use_sampler(settings.guidance.sampler.name)
    drawing = method_drawing(settings, pipe, precision, num_samples=settings.objectives.num_samples)
    extractors, references = open_references(settings, data, manifest, judge, cache, pipe.device)
    target = class_index(judge.classes, settings.target)
    shown, rows = [], []
    for scale in (None, *settings.objectives.scales):
        guidance = None if scale is None else method_guidance(settings, guide, scale, pipe)
        label = f"objective {settings.objective}: " + ("samples" if scale is None else f"scale {format_scale(scale)}")
        images = draw(pipe, guidance, drawing, label=label).images
        found = evaluate_images(
            images, references, extractors, target=target, judge=judge, guide=guide, device=pipe.device
        )
        shown.append(images[:SHOWN])
        rows.append({"scale": scale, **found})
    return shown, rows


def _best(rows: Sequence[dict[str, Any]]) -> int:
    """Number of the guided row with the lowest class-conditional distance; `rows[0]` is without guidance."""
    conditional = frechet_columns(rows)[1]
    finite = [value if math.isfinite(value := row[conditional]) else math.inf for row in rows]
    return min(range(1, len(rows)), key=finite.__getitem__)


def _of_samples(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of the table: of unguided samples distance, precision and recall; of guided ones at their best scale the
    share of the target and the class-conditional distance."""
    everything, conditional = frechet_columns(rows)
    best = rows[_best(rows)]
    columns: dict[str, Any] = {"scale": best["scale"]}
    for row, names in (
        (rows[0], {everything: everything, "precision_all": "precision", "recall_all": "recall"}),
        (best, {"accuracy_judge": "accuracy_judge", "accuracy_guide": "accuracy_guide", conditional: conditional}),
    ):
        for source, name in names.items():
            columns |= with_interval(name, row[source], (row[f"{source}_lo"], row[f"{source}_hi"]))
    return columns
