"""Verbs that measure: references, metrics, the search for a scale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from nrcg.cli.arguments import (
    Verbs,
    add_verb,
    choose_device,
    nonnegative,
    open_pipeline,
    positive,
    positive_or_auto,
    positive_or_zero,
    print_table,
    read_settings,
)
from nrcg.config import BestBy, EvaluateStep, ReferenceStep, SampleStep, get_experiment, load, step_settings
from nrcg.errors import ConfigError, DataError
from nrcg.layout import format_scale
from nrcg.steps.common import checked_data, data_tags, log_dataset
from nrcg.steps.sample import draw_samples, method_guidance

REFERENCE_CACHE = ".nrcg/references"
"""Where features of reference images are kept; safe to delete."""


def add_reference(verbs: Verbs) -> None:
    sub = add_verb(verbs, "reference", reference, step=True, compute=True)
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--classifiers", required=True, help="models/<experiment>/classifiers")
    sub.add_argument("--cache", default=REFERENCE_CACHE, help=f"folder of the features; default {REFERENCE_CACHE}")
    sub.add_argument("--out", required=True, help="results/<experiment>/reference.json")


def reference(arguments: argparse.Namespace) -> None:
    """What every method is compared with: features of the training images, and how good the classifiers are."""
    from nrcg.files import write_record
    from nrcg.steps.reference import describe_reference

    settings: ReferenceStep = read_settings(arguments, "reference")
    checked_data(arguments.data)
    device, _ = choose_device(arguments, settings)
    record = describe_reference(
        settings, Path(arguments.data), Path(arguments.classifiers), Path(arguments.cache), device
    )
    write_record(arguments.out, record)


def add_evaluate(verbs: Verbs) -> None:
    sub = add_verb(verbs, "evaluate", evaluate, compute=True)
    sub.add_argument(
        "--samples",
        required=True,
        help="a folder of images, .npy or .npz; of an experiment results/<experiment>/samples",
    )
    sub.add_argument(
        "--reference", required=True, help="real images likewise; of an experiment results/<experiment>/reference.json"
    )
    sub.add_argument("--out", help="a .json or .csv file; of an experiment results/<experiment>/metrics/<method>.csv")
    own = sub.add_argument_group("anybody's images")
    own.add_argument(
        "--features",
        nargs="+",
        default=["auto"],
        metavar="PROTOCOL",
        help="inception, torcheval, judge, SPEC of a network; auto: what is at hand; given: both sides hold features",
    )
    own.add_argument("--weights-dir", default="weights", help="folder of the Inception weights; default: weights")
    own.add_argument("--classifier", help="a judge for the accuracy, as for `nrcg sample`")
    own.add_argument("--target", help="class of the reference's labels and of the classifier")
    own.add_argument("--reference-labels", metavar="FILE", help=".npy or .csv; default: the names of the subfolders")
    own.add_argument("--num-samples", type=positive, help="only the first samples")
    own.add_argument(
        "--num-pairwise", type=positive_or_zero, default=10_000, help="images compared in pairs; 0: all; default: 10000"
    )
    own.add_argument("--image-size", type=positive, help="resize all images to this many pixels squared first")
    own.add_argument(
        "--batch-size", type=positive_or_auto, default="auto", help="auto: 64, fewer where memory runs out"
    )
    own.add_argument("--seed", type=positive_or_zero, default=0, help="of the intervals' bootstrap")
    step = sub.add_argument_group("a method of an experiment")
    step.add_argument("--config", help="config.yaml, or a step's settings file")
    step.add_argument("--experiment", help="which experiment of config.yaml")
    step.add_argument("--method", help="a key of methods")
    step.add_argument("--scales", type=nonnegative, nargs="+", help="the method's scales")
    step.add_argument("--data", help="data/<dataset>")
    step.add_argument("--classifiers", help="models/<experiment>/classifiers")
    step.add_argument("--ddpm", help="models/<experiment>/ddpm: refuse samples of other weights")
    step.add_argument("--cache", default=REFERENCE_CACHE, help=f"folder of the features; default {REFERENCE_CACHE}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Metrics of one method over its scales, or of anybody's images."""
    if arguments.config is None:
        try:
            _evaluate_own(arguments)
        except (ValueError, TypeError) as error:  # a setting that the library refuses
            raise ConfigError(" ".join(str(error).split())) from error
        return
    from nrcg import tracking
    from nrcg.csv_files import write_csv
    from nrcg.report.best import best_per_method
    from nrcg.report.columns import frechet_columns
    from nrcg.steps.evaluate import evaluate_method
    from nrcg.steps.reference import read_reference_record

    for flag in ("method", "scales", "data", "classifiers", "out"):
        if getattr(arguments, flag) is None and (flag != "method" or arguments.experiment):
            raise ConfigError(f"--{flag}: missing; with --config it is needed")
    settings: EvaluateStep = read_settings(arguments, "evaluate", arguments.method)
    data, manifest = Path(arguments.data), checked_data(arguments.data)
    device, _ = choose_device(arguments, settings)
    tags = {"method": settings.method, "dataset": manifest["name"], "nrcg.step": "1000 x scale"}
    with tracking.run(
        settings.experiment, settings.method, kind=tracking.KIND_METHOD, params=settings.model_dump(), tags=tags
    ) as run:
        log_dataset(run, manifest, data, "train", "reference")
        rows, columns = evaluate_method(
            settings,
            Path(arguments.samples),
            data,
            Path(arguments.classifiers),
            arguments.scales,
            device,
            record=read_reference_record(Path(arguments.reference)),
            cache=Path(arguments.cache),
            traces=Path(arguments.out).with_suffix(""),
            ddpm=None if arguments.ddpm is None else Path(arguments.ddpm),
        )
        best = best_per_method([row | {"best_by": settings.evaluation.best_by} for row in rows])[settings.method]
        shown = ("scale", "accuracy_judge", "accuracy_guide", *frechet_columns(rows))
        tracking.log_method_over_scales(run, rows, {name: best[name] for name in shown})
        write_csv(arguments.out, rows, columns)


def _evaluate_own(arguments: argparse.Namespace) -> None:
    """`nrcg evaluate --samples ... --reference ...`: a table, and JSON or CSV."""
    import contextlib
    import math

    from nrcg.csv_files import write_csv
    from nrcg.evaluation.custom_images import evaluate_own, open_side
    from nrcg.files import atomic_write_text
    from nrcg.pipeline.progress import Progress
    from nrcg.report.tables import format_interval, format_number

    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and (out.suffix not in (".json", ".csv") or out.is_dir()):
        raise ConfigError(f"--out: {out}: must be a file that ends in .json or .csv")
    for flag in ("method", "experiment", "scales", "data", "classifiers", "ddpm"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag}: belongs to an experiment; give its --config")
    samples = open_side(arguments.samples, image_size=arguments.image_size)
    reference = open_side(arguments.reference, labels=arguments.reference_labels, image_size=arguments.image_size)
    device, _ = choose_device(arguments, None)
    with contextlib.ExitStack() as stack:
        row, warnings = evaluate_own(
            samples,
            reference,
            features=arguments.features,
            weights_dir=arguments.weights_dir,
            classifier=arguments.classifier,
            target=arguments.target,
            num_samples=arguments.num_samples,
            num_pairwise=arguments.num_pairwise or None,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=device,
            on_plan=lambda total: stack.enter_context(Progress("evaluate", total, "image")).set,
        )
    measured = [name for name in row if f"{name}_lo" in row]
    print_table(
        [("metric", "value", "95 % interval")]
        + [(name, format_number(row[name]), format_interval(row, name)) for name in measured]
    )
    print()
    for name in row:
        if name not in measured and name.removesuffix("_lo").removesuffix("_hi") not in measured and row[name] != "":
            print(f"{name}: {row[name]}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if out is None:
        return
    if out.suffix == ".csv":
        row["warnings"] = " | ".join(warnings)
        write_csv(out, [row], list(row))
    else:
        plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        atomic_write_text(out, json.dumps(plain | {"warnings": warnings}, indent=2, allow_nan=False) + "\n")


def add_tune(verbs: Verbs) -> None:
    sub = add_verb(verbs, "tune", tune, compute=True)
    sub.add_argument("experiment", metavar="EXPERIMENT")
    sub.add_argument("--method", required=True, help="a key of methods")
    sub.add_argument("--budget", type=positive, default=12, help="scales to measure at most; default 12")
    sub.add_argument("--num-samples", type=positive, default=256, help="samples of each scale; default 256")
    sub.add_argument("--low", type=nonnegative, help="lowest scale; default: a tenth of the sweep's lowest, or 0.1")
    sub.add_argument("--high", type=nonnegative, help="highest scale; default: ten times the sweep's highest, or 1000")
    sub.add_argument("--config", default="config.yaml")
    sub.add_argument("--out", help="the block for config.yaml; default: results/EXPERIMENT/tune/<method>.yaml")


def tune(arguments: argparse.Namespace) -> None:
    """Search for the best guidance scale of a method."""
    from nrcg.evaluation.pairwise import DENSITY_K
    from nrcg.files import atomic_write_text, exclusive
    from nrcg.pipeline import tune as search

    config = load(arguments.config)
    experiment = get_experiment(config, arguments.experiment)
    sampled: SampleStep = step_settings(config, arguments.experiment, "sample", arguments.method)
    evaluated: EvaluateStep = step_settings(config, arguments.experiment, "evaluate", arguments.method)
    if sampled.guidance.classifier is None:
        raise ConfigError(f"--method: nothing guides {arguments.method}, so it has no scale")
    if arguments.num_samples <= DENSITY_K:
        raise ConfigError(f"--num-samples: {arguments.num_samples}; an evaluation needs {DENSITY_K + 1} or more")
    if arguments.out and Path(arguments.out).is_dir():
        raise ConfigError(f"--out: {arguments.out}: is a folder; name a file")
    for settings in (sampled, evaluated):
        settings.sampling.num_samples = arguments.num_samples
    low, high = search.scale_range(experiment.sweep.get(arguments.method, []))
    low, high = low if arguments.low is None else arguments.low, high if arguments.high is None else arguments.high
    search.check_range(low, high)
    data, models = Path("data") / experiment.dataset.name, Path("models") / arguments.experiment
    needed = [data / "dataset.json", models / "ddpm" / "model_index.json"]
    needed += [models / "classifiers" / role / "config.json" for role in ("judge", sampled.guidance.classifier)]
    missing = [path.as_posix() for path in needed if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: not there; run: snakemake {' '.join(missing)} --cores all --resources gpu=1")
    folder = Path("results") / arguments.experiment / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    best_by = experiment.evaluation.best_by
    with exclusive(
        folder / f".{arguments.method}.lock", f"{folder}: {arguments.method} is being tuned by another process"
    ):
        try:
            rows = _tune_method(arguments, sampled, evaluated, data, models, low, high, best_by, folder)
        except (ValueError, TypeError) as error:  # a model or setting that the library refuses
            raise ConfigError(" ".join(str(error).split())) from error
    best = search.best_row(rows, best_by)
    block = search.yaml_block(arguments.experiment, arguments.method, best["scale"])
    out = Path(arguments.out) if arguments.out else folder / f"{arguments.method}.yaml"
    atomic_write_text(out, block)
    print_table(search.table(rows, best_by))
    for note in search.notes(rows, best_by, low, high):
        print(f"note: {note}")
    print(f"\n{out}:\n{block}", end="")


def _tune_method(
    arguments: argparse.Namespace,
    sampled: SampleStep,
    evaluated: EvaluateStep,
    data: Path,
    models: Path,
    low: float,
    high: float,
    best_by: str,
    folder: Path,
) -> list[dict]:
    """The rows of a search; one tracking run with a step per scale."""
    import math
    import tempfile

    from nrcg import tracking
    from nrcg.classifiers.logits import class_index
    from nrcg.classifiers.storage import open_classifier
    from nrcg.config import fingerprint
    from nrcg.data.arrays import load_manifest
    from nrcg.evaluation.evaluate import evaluate_images
    from nrcg.files import weights_sha256
    from nrcg.pipeline.tune import search
    from nrcg.steps.reference import open_references

    classifiers, method, sampling = models / "classifiers", sampled.guidance, sampled.sampling
    arguments.ddpm = str(models / "ddpm")
    pipe, device, precision = open_pipeline(arguments, sampled)
    pipe.use_sampler(method.sampler.name)
    roles = (method.classifier, "judge")
    guide, judge = (open_classifier(classifiers / role).to(device) for role in roles)
    target = class_index(judge.classes, sampled.target)
    manifest = load_manifest(data)
    extractors, references = open_references(evaluated, data, judge, Path(REFERENCE_CACHE), device)
    key = {
        "sample": sampled.fingerprint(),
        "evaluate": evaluated.fingerprint(),
        "weights": [weights_sha256(models / "ddpm"), *(weights_sha256(classifiers / role) for role in roles)],
        "precision": str(precision),
        "references": [reference.identity for reference in references],
    }

    def measure(scale: float) -> dict:
        """One sampling run with the experiment's seeds, the same for every scale, and one evaluation."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "samples.npy"
            images = draw_samples(
                path,
                pipe,
                method_guidance(sampled, guide, scale, pipe),
                device,
                precision,
                num_samples=sampling.num_samples,
                first_sample=0,
                batch_size=sampling.batch_size,
                seed=sampling.seed,
                start=sampling.start,
                label=f"tune {sampled.method} scale {format_scale(scale)}",
                num_inference_steps=method.sampler.steps,
                eta=method.sampler.eta,
                record={},
            )
            record = json.loads(path.with_suffix(".json").read_text())
        row = evaluate_images(images, references, extractors, target=target, judge=judge, guide=guide, device=device)
        return row | {"nonfinite": record["nonfinite"], "images_per_second": len(images) / record["seconds"]}

    params = {
        "method": sampled.method,
        "low": low,
        "high": high,
        "budget": arguments.budget,
        "best_by": best_by,
        "settings": evaluated.model_dump(),
    }
    tags = data_tags(manifest) | {"method": sampled.method}
    name = f"tune {sampled.method}"
    with tracking.run(sampled.experiment, name, kind="tune", params=params, tags=tags) as run:

        def keep(row: dict, number: int) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            run.log_metrics({key: value for key, value in numbers.items() if math.isfinite(value)}, step=number)
            print(f"{number + 1} of at most {arguments.budget}: scale {format_scale(row['scale'])}", flush=True)

        rows = search(
            measure,
            low=low,
            high=high,
            budget=arguments.budget,
            best_by=best_by,
            journal=folder / f"{sampled.method}.csv",
            settings=fingerprint(key),
            on_row=keep,
        )
        run.log_artifact(folder / f"{sampled.method}.csv")
    return rows


def add_collect(verbs: Verbs) -> None:
    sub = add_verb(verbs, "collect", collect)
    sub.add_argument("--metrics", nargs="+", required=True, help="results/<experiment>/metrics/*.csv")
    sub.add_argument("--out", required=True, help="results/<experiment>/metrics.csv")
    sub.add_argument("--best-by", choices=get_args(BestBy), default="cfid", help="rule for the best scale")
    sub.add_argument("--summary", help="results/<experiment>/summary.json")


def collect(arguments: argparse.Namespace) -> None:
    """Join the methods' metrics into metrics.csv and summary.json."""
    from nrcg.csv_files import write_csv
    from nrcg.report.best import summarize
    from nrcg.report.columns import check_comparable, extractor, read_metrics

    tables = {path: read_metrics(path) for path in arguments.metrics}
    extractors = {path: extractor(rows) for path, rows in tables.items()}
    if len(set(extractors.values())) > 1:
        raise DataError(f"features differ and cannot be compared: {extractors}; evaluate every method anew")
    rows = [row | {"best_by": arguments.best_by} for rows in tables.values() for row in rows]
    check_comparable(rows, [path for path, own in tables.items() for _ in own])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(arguments.out, rows, columns)
    if arguments.summary:
        from nrcg.files import write_record

        write_record(arguments.summary, summarize(rows))
