"""TODO steps.evaluate."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import EvaluateStep, SampleStep
from nrcg.data.arrays import load_manifest
from nrcg.data.pictures import sample_grid, save_png
from nrcg.data.shards import read_samples
from nrcg.evaluation.evaluate import GRID_SAMPLES, _with_interval, evaluate_images
from nrcg.files import weights_sha256
from nrcg.guidance.trace import Trace
from nrcg.layout import format_scale, setting_folder
from nrcg.pipeline.progress import Progress
from nrcg.report.columns import check_comparable
from nrcg.report.trace_figure import save_trace_figure
from nrcg.steps.reference import _warn_of_rank, open_references


def evaluate_method(
    settings: EvaluateStep,
    samples: Path,
    data: Path,
    classifiers: Path,
    scales: list[float],
    device: torch.device,
    *,
    record: Mapping,
    cache: Path,
    traces: Path,
    ddpm: Path | None = None,
) -> tuple[list[dict], list[str]]:
    """Metrics of a method's samples at each scale, logged as one tracking run per scale.

    `accuracy_guide` is graded by the classifier that guided (self-graded), by the non-robust one where none did;
    `accuracy_judge` by the judge, which never guides.

    Args:
        samples: results/<experiment>/samples.
        data: data/<dataset>.
        classifiers: models/<experiment>/classifiers.
        record: of `describe_reference`: how good the classifiers are on clean images.
        cache: folder of the references, made anew where they are missing.
        traces: folder for the pictures of what the guidance did, where the settings asked for a trace.
        ddpm: models/<experiment>/ddpm; None does not ask which weights drew the samples.

    Returns:
        A row per scale and the columns' names.

    Raises:
        DataError: samples are damaged, or not what these settings and weights draw.
    """
    judge = open_classifier(classifiers / "judge").to(device)
    guide_role = settings.guidance.classifier or "non_robust"
    guide = open_classifier(classifiers / guide_role).to(device)
    target = class_index(judge.classes, settings.target)
    manifest = load_manifest(data)
    extractors, references = open_references(settings, data, judge, cache, device)
    made_by = {"method": settings.method, "settings": sample_settings(settings).fingerprint()}
    if ddpm is not None:
        made_by["weights_sha256"] = {"ddpm": weights_sha256(ddpm)}
        if settings.guidance.classifier is not None:
            made_by["weights_sha256"]["classifier"] = weights_sha256(classifiers / guide_role)
    quality = {}
    for name, role in (("judge", "judge"), ("guide", guide_role)):
        for measure, (value, *interval) in (
            (key, record["classifiers"][role][key]) for key in ("clean_accuracy", "ece")
        ):
            quality |= _with_interval(f"{name}_{measure}", value, interval)
    rows = []
    with Progress(f"evaluate {settings.method}", settings.sampling.num_samples * len(scales), "image") as bar:
        for number, scale in enumerate(scales):
            folder = setting_folder(samples, settings.method, scale)
            drawn = read_samples(folder, settings.sampling.num_samples, made_by | {"scale": scale})
            before = number * len(drawn.images)
            row = {"experiment": settings.experiment, "method": settings.method, "scale": scale}
            row |= evaluate_images(
                drawn.images,
                references,
                extractors,
                target=target,
                judge=judge,
                guide=guide,
                device=device,
                progress=lambda done, before=before: bar.set(before + done),
            )
            row |= quality
            row |= {
                "nonfinite": drawn.nonfinite,
                "images_per_second": drawn.images_per_second,
                "peak_memory_mib": drawn.peak_memory_mib,
            }
            trace = _read_trace(folder, settings)
            if trace is not None:
                traces.mkdir(parents=True, exist_ok=True)
                save_trace_figure(traces / f"trace_scale{format_scale(scale)}.png", trace)
            row["mlflow_run_id"] = _log(settings, row, drawn.images, manifest, trace)
            rows.append(row)
    check_comparable(rows)
    for extractor in extractors:
        _warn_of_rank(extractor.name, min(row["num_samples"] for row in rows), extractor.dim)
    return rows, list(rows[0])


def sample_settings(settings: EvaluateStep) -> SampleStep:
    """What the samples that are evaluated must have been drawn by."""
    return SampleStep(**{name: getattr(settings, name) for name in SampleStep.model_fields})


def _read_trace(folder: Path, settings: EvaluateStep) -> Trace | None:
    """What the guidance did in each step, over all shards, where the settings asked for it."""
    paths = sorted(folder.glob("shard*.trace.npz")) if settings.sampling.trace else []
    if not paths:
        return None  # not asked for, or nothing guided
    num_shards = -(-settings.sampling.num_samples // settings.sampling.shard_size)
    return Trace.join([Trace.load(path) for path in paths[:num_shards]])


def _log(settings: EvaluateStep, row: dict, images: np.ndarray, manifest: dict, trace: Trace | None) -> str:
    """One tracking run per method and scale; returns its id."""
    params = {
        "scale": row["scale"],
        "method": settings.method,
        "target": settings.target,
        "protocols": row["protocols"],
        "reference": row["reference"],
        "sampling": settings.sampling.model_dump(),
        "guidance": settings.guidance.model_dump(),
    }
    name = f"{settings.method} scale {format_scale(row['scale'])}"
    tags = {"dataset": manifest["name"], "method": settings.method}
    with tracking.run(settings.experiment, name, kind="sample", params=params, tags=tags) as run:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "scale"}
        finite = {key: value for key, value in numbers.items() if np.isfinite(value)}
        run.log_metrics(finite, step=tracking.scale_step(row["scale"]))
        with tempfile.TemporaryDirectory() as folder:
            save_png(Path(folder) / "samples.png", sample_grid(images[:GRID_SAMPLES], 8))
            run.log_artifact(Path(folder) / "samples.png")
            if trace is not None:
                save_trace_figure(Path(folder) / "trace.png", trace)
                run.log_artifact(Path(folder) / "trace.png")
        if trace is not None:
            means = trace.mean()
            for column, t in enumerate(trace.t.tolist()):
                known = {f"trace.{name}": values[column] for name, values in means.items()}
                run.log_metrics({name: value for name, value in known.items() if np.isfinite(value)}, step=t)
        return run.id
