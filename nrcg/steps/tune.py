"""The search for a method's guidance scale, or for scale, interval and stabilizer together: sampling and evaluation at
each setting that is tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import Config, EvaluateStep, MethodConfig, SampleStep, fingerprint, step_settings
from nrcg.csv_files import Row, read_csv
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.evaluate import evaluate_images
from nrcg.evaluation.pairwise import DENSITY_K
from nrcg.files import atomic_write_text, exclusive, weights_sha256
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.scales import informed_interval
from nrcg.layout import REFERENCE_CACHE, DatasetPaths, ExperimentPaths, format_scale
from nrcg.pipeline.halving import (
    RUNGS,
    Candidate,
    best_of,
    check_dimensions,
    draw_candidates,
    joint_block,
    plan,
    search_jointly,
)
from nrcg.pipeline.tune import best_row, search, yaml_block
from nrcg.steps.common import checked_data, data_tags
from nrcg.steps.reference import open_references
from nrcg.steps.sample import draw, method_drawing, method_guidance


@dataclass(frozen=True)
class _Bench:
    """What measures a setting of a method.

    Attributes:
        sampled, evaluated: Settings of the steps.
        paths: Of the experiment.
        measure: A method, a scale and a number of samples to a row of metrics.
        key: What decides a row, beside these.
        tags: Of the tracking run.
    """

    sampled: SampleStep
    evaluated: EvaluateStep
    paths: ExperimentPaths
    measure: Callable[[MethodConfig, float, int], Row]
    key: dict[str, Any]
    tags: dict[str, str]

    @property
    def best_by(self) -> str:
        return self.evaluated.evaluation.best_by

    @contextmanager
    def tracked(self, name: str, params: dict[str, Any], journal: Path) -> Iterator[Callable[[Row, int], None]]:
        """A tracking run with a step for each row; gives what keeps a row."""
        method = self.sampled.method
        params = {"method": method, "best_by": self.best_by, **params, "settings": self.evaluated.model_dump()}
        tags = self.tags | {"method": method}
        with tracking.run(self.sampled.experiment, f"{name} {method}", kind="tune", params=params, tags=tags) as run:

            def keep(row: Row, number: int) -> None:
                numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
                run.log_metrics({key: value for key, value in numbers.items() if math.isfinite(value)}, step=number)

            yield keep
            run.log_artifact(journal)


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
) -> tuple[list[Row], str]:
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
    with _bench(config, experiment, method, num_samples, device, precision) as bench:
        journal = bench.paths.tune / f"{method}.csv"
        with bench.tracked("tune", {"low": low, "high": high, "budget": budget}, journal) as keep:

            def told(row: Row, number: int) -> None:
                keep(row, number)
                print(f"{number + 1} of at most {budget}: scale {format_scale(row['scale'])}", flush=True)

            rows = search(
                lambda scale: bench.measure(bench.sampled.guidance, scale, num_samples),
                low=low,
                high=high,
                budget=budget,
                best_by=bench.best_by,
                journal=journal,
                settings=fingerprint(bench.key),
                on_row=told,
            )
    block = yaml_block(experiment, method, best_row(rows, bench.best_by)["scale"])
    atomic_write_text(out, block)
    return rows, block


def tune_jointly(
    config: Config,
    experiment: str,
    method: str,
    *,
    over: Sequence[str],
    low: float,
    high: float,
    budget: int,
    num_samples: int,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[list[Row], str]:
    """Search for scale, interval and stabilizer of a method together, by successive halving.

    Args:
        over: What is searched, of `nrcg.pipeline.halving.DIMENSIONS`; the rest is the method's own.
        budget: Settings that could be measured with num_samples each; some four times as many are tried with fewer.
        config, experiment, method, low, high, num_samples, out, device, precision: As of `tune_method`.

    Returns:
        A row per measurement, and the block for config.yaml.

    Raises:
        ConfigError, DataError: As `tune_method`; or something else is searched, or a budget below three.
    """
    check_dimensions(over)
    if budget < RUNGS:
        raise ConfigError(f"--budget: {budget}; a search over {', '.join(over)} needs {RUNGS} or more")
    with _bench(config, experiment, method, num_samples, device, precision) as bench:
        base, informed = bench.sampled.guidance, _informed(bench.paths, method)
        rungs = plan(budget, num_samples, DENSITY_K + 1)
        tried = draw_candidates(base, rungs[0][0], over=over, low=low, high=high, informed=informed)
        journal = bench.paths.tune / f"{method}_jointly.csv"
        total = sum(min(count, len(tried)) for count, _ in rungs)
        params = {"low": low, "high": high, "budget": budget, "over": "+".join(over)}
        with bench.tracked("tune jointly", params, journal) as keep:

            def told(row: Row, number: int) -> None:
                keep(row, number)
                print(f"{number + 1} of {total}: {row['setting']}, {row['num_samples']:g} samples", flush=True)

            rows = search_jointly(
                lambda one, samples: bench.measure(one.method(base), one.scale, samples),
                tried,
                rungs,
                best_by=bench.best_by,
                journal=journal,
                settings=fingerprint(bench.key),
                on_row=told,
            )
        best, _ = best_of(rows, bench.best_by)
        found: Candidate = next(one for one in tried if one.key() == best["setting"])
    block = joint_block(experiment, method, found, base)
    atomic_write_text(out, block)
    return rows, block


def _informed(paths: ExperimentPaths, method: str) -> tuple[float, float] | None:
    """The interval in which the forward analysis finds the method's guide informed, where there is one."""
    if not paths.forward.is_file():
        return None
    try:
        return informed_interval(read_csv(paths.forward, ("method", "t", "accuracy")), method)
    except ValueError:  # not analysed, or blind throughout
        return None


@contextmanager
def _bench(
    config: Config, experiment: str, method: str, num_samples: int, device: torch.device, precision: torch.dtype
) -> Iterator[_Bench]:
    """Models and references of an experiment, for this process alone while it lasts."""
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
        yield _open(sampled, evaluated, data.folder, paths, device, precision)


def _open(
    sampled: SampleStep,
    evaluated: EvaluateStep,
    data: Path,
    paths: ExperimentPaths,
    device: torch.device,
    precision: torch.dtype,
) -> _Bench:
    method, roles = sampled.method, (sampled.guidance.classifier, "judge")
    pipe = GuidedDDPMPipeline.from_pretrained(paths.ddpm).to(device).use_sampler(sampled.guidance.sampler.name)
    pipe.with_weights(sampled.unet_weights)
    guide, judge = (open_classifier(paths.classifier(role)).to(device) for role in roles)
    manifest = checked_data(data)
    extractors, references = open_references(evaluated, data, manifest, judge, Path(REFERENCE_CACHE), device)
    target = class_index(judge.classes, sampled.target)
    key = {
        "sample": sampled.fingerprint(),
        "evaluate": evaluated.fingerprint(),
        "weights": [weights_sha256(paths.ddpm), *(weights_sha256(paths.classifier(role)) for role in roles)],
        "precision": str(precision),
        "references": [reference.identity for reference in references],
    }

    def measure(guidance: MethodConfig, scale: float, num_samples: int) -> Row:
        settings = sampled.model_copy(update={"guidance": guidance})
        label = f"tune {method} scale {format_scale(scale)}"
        drawing = method_drawing(settings, pipe, precision, num_samples=num_samples)
        drawn = draw(pipe, method_guidance(settings, guide, scale, pipe), drawing, label=label)
        row = evaluate_images(
            drawn.images, references, extractors, target=target, judge=judge, guide=guide, device=device
        )
        speed = len(drawn.images) / drawn.record["seconds"]
        return row | {"nonfinite": drawn.record["nonfinite"], "images_per_second": speed}

    return _Bench(sampled, evaluated, paths, measure, key, data_tags(manifest))
