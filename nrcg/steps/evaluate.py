"""Metrics of a method's samples over its scales."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import EvaluateStep, SampleStep
from nrcg.csv_files import write_csv
from nrcg.data.pictures import sample_grid, save_png
from nrcg.data.shards import SampleSet, read_samples
from nrcg.evaluation.evaluate import evaluate_images, with_interval
from nrcg.files import weights_sha256
from nrcg.guidance.trace import Trace
from nrcg.layout import REFERENCE_CACHE, format_scale, setting_folder
from nrcg.pipeline.progress import Progress
from nrcg.report.best import best_per_method
from nrcg.report.columns import check_comparable, frechet_columns
from nrcg.steps.common import checked_data, log_dataset
from nrcg.steps.reference import open_references, read_reference_record, warn_of_rank

SHORT = 1024
"""An evaluation of fewer samples takes no longer than loading MLflow: its tracking is sent when the invocation ends."""
GRID_SAMPLES = 64
"""Samples in the picture of a tracking run."""


def evaluate_method(
    settings: EvaluateStep,
    *,
    samples: Path,
    data: Path,
    classifiers: Path,
    scales: Sequence[float],
    reference: Path,
    out: Path,
    device: torch.device,
    ddpm: Path | None = None,
    cache: Path = Path(REFERENCE_CACHE),
) -> list[dict]:
    """Metrics of a method's samples at each scale: a table, a tracking run of the method, and one of each scale.

    `accuracy_guide` is graded by the classifier that guided (self-graded), by the non-robust one where none did;
    `accuracy_judge` by the judge, which never guides.

    Args:
        settings: The method's settings.
        samples: results/<experiment>/samples.
        data: data/<dataset>.
        classifiers: models/<experiment>/classifiers.
        scales: Guidance scales.
        reference: reference.json, which says how good the classifiers are on clean images.
        out: The table; a folder of its name takes the pictures of what the guidance did, where a trace was asked for.
        device: Device that computes.
        ddpm: models/<experiment>/ddpm; None does not ask which weights drew the samples.
        cache: Folder of the references, made anew where they are missing.

    Returns:
        A row per scale.

    Raises:
        DataError: Samples are damaged, or not what these settings and weights draw.
    """
    manifest, role = checked_data(data), settings.guidance.classifier or "non_robust"
    tags = {"method": settings.method, "dataset": manifest["name"], "nrcg.step": "1000 x scale"}
    with _tracked(settings, settings.method, tracking.KIND_METHOD, settings.model_dump(), tags) as run:
        log_dataset(run, manifest, data, "train", "reference")
        judge, guide = (open_classifier(classifiers / name).to(device) for name in ("judge", role))
        extractors, references = open_references(settings, data, manifest, judge, cache, device)
        common = {
            "references": references,
            "extractors": extractors,
            "target": class_index(judge.classes, settings.target),
            "judge": judge,
            "guide": guide,
            "device": device,
        }
        quality = _quality(reference, role)
        made_by = _made_by(settings, ddpm, classifiers / role)
        rows: list[dict] = []
        with Progress(f"evaluate {settings.method}", settings.sampling.num_samples * len(scales), "image") as bar:
            for scale in scales:
                folder = setting_folder(samples, settings.method, scale)
                drawn = read_samples(folder, settings.sampling.num_samples, made_by | {"scale": scale})
                before = len(rows) * len(drawn.images)
                found = evaluate_images(
                    drawn.images, **common, progress=lambda done, before=before: bar.set(before + done)
                )
                rows.append(_finished_row(settings, scale, found | quality, drawn, folder, out, manifest))
        check_comparable(rows)
        for extractor in extractors:
            warn_of_rank(extractor.name, min(row["num_samples"] for row in rows), extractor.dim)
        tracking.log_method_over_scales(run, rows, _best(settings, rows))
        write_csv(out, rows, list(rows[0]))
    return rows


def _tracked(settings: EvaluateStep, name: str, kind: str, params: dict, tags: dict) -> AbstractContextManager:
    """A tracking run; that of a short evaluation is sent when the invocation ends."""
    deferred = settings.sampling.num_samples < SHORT
    return tracking.run(settings.experiment, name, kind=kind, params=params, tags=tags, deferred=deferred)


def _best(settings: EvaluateStep, rows: list[dict]) -> dict[str, float]:
    """The numbers of the best scale that MLflow's tables show."""
    best = best_per_method([row | {"best_by": settings.evaluation.best_by} for row in rows])[settings.method]
    return {name: best[name] for name in ("scale", "accuracy_judge", "accuracy_guide", *frechet_columns(rows))}


def _finished_row(
    settings: EvaluateStep, scale: float, found: dict, drawn: SampleSet, folder: Path, out: Path, manifest: dict
) -> dict:
    """A scale's row, tracked as a run of its own, with the picture of the trace where there is one."""
    row = {"experiment": settings.experiment, "method": settings.method, "scale": scale, **found}
    row |= {key: getattr(drawn, key) for key in ("nonfinite", "images_per_second", "peak_memory_mib")}
    trace = _read_trace(folder, settings)
    if trace is not None:
        _draw_trace(out.with_suffix("") / f"trace_scale{format_scale(scale)}.png", trace)
    return row | {"mlflow_run_id": _log(settings, row, drawn.images, manifest, trace)}


def _quality(reference: Path, role: str) -> dict[str, float]:
    """How good judge and guide are on clean images, as columns with their intervals."""
    record, columns = read_reference_record(reference), {}
    for name, classifier in (("judge", "judge"), ("guide", role)):
        for measure in ("clean_accuracy", "ece"):
            value, *interval = record["classifiers"][classifier][measure]
            columns |= with_interval(f"{name}_{measure}", value, interval)
    return columns


def _made_by(settings: EvaluateStep, ddpm: Path | None, guide: Path) -> dict[str, object]:
    """What must have drawn the samples."""
    made_by: dict[str, object] = {"method": settings.method, "settings": sample_settings(settings).fingerprint()}
    if ddpm is not None:
        weights = {"ddpm": weights_sha256(ddpm)}
        if settings.guidance.classifier is not None:
            weights["classifier"] = weights_sha256(guide)
        made_by["weights_sha256"] = weights
    return made_by


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


def _draw_trace(path: Path, trace: Trace) -> None:
    """The figure of a trace: it alone needs matplotlib, which metrics do without."""
    from nrcg.report.trace_figure import save_trace_figure

    save_trace_figure(path, trace)


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
    with _tracked(settings, name, "sample", params, tags) as run:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "scale"}
        finite = {key: value for key, value in numbers.items() if np.isfinite(value)}
        run.log_metrics(finite, step=tracking.scale_step(row["scale"]))
        with tempfile.TemporaryDirectory() as folder:
            save_png(Path(folder) / "samples.png", sample_grid(images[:GRID_SAMPLES], 8))
            run.log_artifact(Path(folder) / "samples.png")
            if trace is not None:
                _draw_trace(Path(folder) / "trace.png", trace)
                run.log_artifact(Path(folder) / "trace.png")
        if trace is not None:
            means = trace.mean()
            for column, t in enumerate(trace.t.tolist()):
                known = {f"trace.{name}": values[column] for name, values in means.items()}
                run.log_metrics({name: value for name, value in known.items() if np.isfinite(value)}, step=t)
        return run.id
