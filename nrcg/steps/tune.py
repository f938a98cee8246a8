"""The search for a method's guidance scale: sampling and evaluation at each scale that is tried."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import Config, EvaluateStep, SampleStep, fingerprint, step_settings
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.evaluate import evaluate_images
from nrcg.evaluation.pairwise import DENSITY_K
from nrcg.files import atomic_write_text, exclusive, weights_sha256
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.layout import REFERENCE_CACHE, DatasetPaths, ExperimentPaths, format_scale
from nrcg.pipeline.tune import best_row, search, yaml_block
from nrcg.steps.common import checked_data, data_tags
from nrcg.steps.reference import open_references
from nrcg.steps.sample import draw, method_drawing, method_guidance


def tune_method(
    config: Config,
    experiment: str,
    method: str,
    *,
    low: float,
    high: float,
    budget: int,
    num_samples: int,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[list[dict], str]:
    """Search for the best guidance scale of a method; one tracking run with a step per scale.

    Args:
        config: The whole configuration.
        experiment: Name of the experiment, whose models are there already.
        method: Name of the method.
        low, high: Range that is searched.
        budget: Scales to measure at most.
        num_samples: Samples of each scale, the same seeds for every one.
        out: The block for config.yaml.
        device: Device that computes.
        precision: Autocast of the U-Net.

    Returns:
        A row per scale measured, and the block for config.yaml.

    Raises:
        ConfigError: Nothing guides the method, or too few samples.
        DataError: Data or models are missing, or another process tunes this method.
    """
    sampled: SampleStep = step_settings(config, experiment, "sample", method)
    evaluated: EvaluateStep = step_settings(config, experiment, "evaluate", method)
    if sampled.guidance.classifier is None:
        raise ConfigError(f"--method: nothing guides {method}, so it has no scale")
    if num_samples <= DENSITY_K:
        raise ConfigError(f"--num-samples: {num_samples}; an evaluation needs {DENSITY_K + 1} or more")
    for settings in (sampled, evaluated):
        settings.sampling.num_samples = num_samples
    data, paths = DatasetPaths(config.experiments[experiment].dataset.name), ExperimentPaths(experiment)
    roles = (sampled.guidance.classifier, "judge")
    needed = [
        data.manifest,
        paths.ddpm / "model_index.json",
        *(paths.classifier(role) / "config.json" for role in roles),
    ]
    for path in needed:
        if not path.is_file():
            raise DataError("not there", path)
    paths.tune.mkdir(parents=True, exist_ok=True)
    busy = f"{paths.tune}: {method} is being tuned by another process"
    with exclusive(paths.tune / f".{method}.lock", busy):
        rows = _search(sampled, evaluated, data.folder, paths, low, high, budget, device, precision)
    block = yaml_block(experiment, method, best_row(rows, evaluated.evaluation.best_by)["scale"])
    atomic_write_text(out, block)
    return rows, block


def _search(
    sampled: SampleStep,
    evaluated: EvaluateStep,
    data: Path,
    paths: ExperimentPaths,
    low: float,
    high: float,
    budget: int,
    device: torch.device,
    precision: torch.dtype,
) -> list[dict]:
    method, best_by = sampled.method, evaluated.evaluation.best_by
    roles = (sampled.guidance.classifier, "judge")
    pipe = GuidedDDPMPipeline.from_pretrained(paths.ddpm).to(device).use_sampler(sampled.guidance.sampler.name)
    pipe.with_weights(sampled.unet_weights)
    guide, judge = (open_classifier(paths.classifier(role)).to(device) for role in roles)
    manifest = checked_data(data)
    extractors, references = open_references(evaluated, data, manifest, judge, Path(REFERENCE_CACHE), device)
    target = class_index(judge.classes, sampled.target)
    drawing = method_drawing(sampled, pipe, precision, num_samples=sampled.sampling.num_samples)
    key = {
        "sample": sampled.fingerprint(),
        "evaluate": evaluated.fingerprint(),
        "weights": [weights_sha256(paths.ddpm), *(weights_sha256(paths.classifier(role)) for role in roles)],
        "precision": str(precision),
        "references": [reference.identity for reference in references],
    }

    def measure(scale: float) -> dict:
        label = f"tune {method} scale {format_scale(scale)}"
        drawn = draw(pipe, method_guidance(sampled, guide, scale, pipe), drawing, label=label)
        row = evaluate_images(
            drawn.images, references, extractors, target=target, judge=judge, guide=guide, device=device
        )
        speed = len(drawn.images) / drawn.record["seconds"]
        return row | {"nonfinite": drawn.record["nonfinite"], "images_per_second": speed}

    range_ = {"method": method, "low": low, "high": high, "budget": budget, "best_by": best_by}
    params = range_ | {"settings": evaluated.model_dump()}
    tags = data_tags(manifest) | {"method": method}
    journal = paths.tune / f"{method}.csv"
    with tracking.run(sampled.experiment, f"tune {method}", kind="tune", params=params, tags=tags) as run:

        def keep(row: dict, number: int) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            run.log_metrics({key: value for key, value in numbers.items() if math.isfinite(value)}, step=number)
            print(f"{number + 1} of at most {budget}: scale {format_scale(row['scale'])}", flush=True)

        rows = search(
            measure,
            low=low,
            high=high,
            budget=budget,
            best_by=best_by,
            journal=journal,
            settings=fingerprint(key),
            on_row=keep,
        )
        run.log_artifact(journal)
    return rows
