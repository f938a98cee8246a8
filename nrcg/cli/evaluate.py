"""Verbs that measure: metrics, and the search for a scale."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_method,
    add_verb,
    choose_device,
    nonnegative,
    one_line,
    positive,
    positive_or_auto,
    positive_or_zero,
    print_table,
    run_step,
)
from nrcg.cli.imports import lean_imports
from nrcg.cli.steps import CACHE, CLASSIFIERS, DATA
from nrcg.config import get_experiment, load
from nrcg.errors import ConfigError
from nrcg.layout import ExperimentPaths

SAME = ("features", "weights_dir", "classifier", "target", "num_samples", "batch_size", "seed")
"""Flags that are arguments of `evaluate_custom` as they are."""


def add_evaluate(verbs: Verbs) -> None:
    sub = add_verb(verbs, "evaluate", evaluate, compute=True)
    add_files(
        sub,
        samples="a folder of images, .npy or .npz; of an experiment results/<experiment>/samples",
        reference="real images likewise; of an experiment results/<experiment>/reference.json",
    )
    table = "a .json or .csv file; of an experiment results/<experiment>/metrics/<method>.csv"
    add_files(sub, required=False, out=table)
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
    add_method(step)
    step.add_argument("--scales", type=nonnegative, nargs="+", help="the method's scales")
    weights = "models/<experiment>/ddpm: refuse samples of other weights"
    add_files(step, required=False, **DATA, **CLASSIFIERS, ddpm=weights, **CACHE)


def evaluate(arguments: argparse.Namespace) -> None:
    """Metrics of one method over its scales, or of anybody's images."""
    if arguments.config is None:
        with one_line():
            _evaluate_images(arguments)
        return
    for flag in ("method", "scales", "data", "classifiers", "out"):
        if getattr(arguments, flag) is None and (flag != "method" or arguments.experiment):
            raise ConfigError(f"--{flag}: missing; with --config it is needed")
    run_step(arguments, "evaluate.evaluate_method", "evaluate", arguments.method)


def _evaluate_images(arguments: argparse.Namespace) -> None:
    """`nrcg evaluate --samples ... --reference ...`: a table, and JSON or CSV."""
    from nrcg.csv_files import write_csv
    from nrcg.evaluation.custom_images import evaluate_custom
    from nrcg.evaluation.sides import open_side
    from nrcg.files import atomic_write_text
    from nrcg.pipeline.progress import Progress
    from nrcg.report.tables import format_interval, format_number

    out = arguments.out
    if out is not None and (out.suffix not in (".json", ".csv") or out.is_dir()):
        raise ConfigError(f"--out: {out}: must be a file that ends in .json or .csv")
    for flag in ("method", "experiment", "scales", "data", "classifiers", "ddpm"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag}: belongs to an experiment; give its --config")
    samples = open_side(arguments.samples, image_size=arguments.image_size)
    reference = open_side(arguments.reference, labels=arguments.reference_labels, image_size=arguments.image_size)
    device, _ = choose_device(arguments, None)
    with contextlib.ExitStack() as stack:
        row, warnings = evaluate_custom(
            samples,
            reference,
            num_pairwise=arguments.num_pairwise or None,
            device=device,
            **{name: getattr(arguments, name) for name in SAME},
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
    sub.add_argument(
        "--over",
        default="scale",
        metavar="NAMES",
        help="what is searched: scale, or several together, such as scale,interval,stabilizer; default: scale",
    )
    sub.add_argument("--budget", type=positive, default=12, help="settings to measure at most; default 12")
    sub.add_argument("--num-samples", type=positive, default=256, help="samples of each; default 256")
    sub.add_argument("--low", type=nonnegative, help="lowest scale; default: a tenth of the sweep's lowest, or 0.1")
    sub.add_argument("--high", type=nonnegative, help="highest scale; default: ten times the sweep's highest, or 1000")
    sub.add_argument("--config", default="config.yaml")
    add_files(sub, required=False, out="the block for config.yaml; default: results/EXPERIMENT/tune/<method>.yaml")


def tune(arguments: argparse.Namespace) -> None:
    """Search for the best guidance scale of a method, or for scale, interval and stabilizer together."""
    from nrcg.pipeline import halving
    from nrcg.pipeline import tune as search

    over = [name.strip() for name in arguments.over.split(",")]
    halving.check_dimensions(over)
    jointly = over != ["scale"]
    with lean_imports():
        from nrcg.steps.tune import tune_jointly, tune_method

    config = load(arguments.config)
    experiment = get_experiment(config, arguments.experiment)
    if arguments.out and arguments.out.is_dir():
        raise ConfigError(f"--out: {arguments.out}: is a folder; name a file")
    low, high = search.scale_range(experiment.sweep.get(arguments.method, []))
    low, high = low if arguments.low is None else arguments.low, high if arguments.high is None else arguments.high
    search.check_range(low, high)
    device, precision = choose_device(arguments, experiment)
    file = f"{arguments.method}_jointly.yaml" if jointly else f"{arguments.method}.yaml"
    out = arguments.out or ExperimentPaths(arguments.experiment).tune / file
    how = {"low": low, "high": high, "budget": arguments.budget, "num_samples": arguments.num_samples, "out": out}
    how |= {"device": device, "precision": precision}
    with one_line():
        if jointly:
            rows, block = tune_jointly(config, arguments.experiment, arguments.method, over=over, **how)
        else:
            rows, block = tune_method(config, arguments.experiment, arguments.method, **how)
    best_by = experiment.evaluation.best_by
    print_table(halving.joint_table(rows, best_by) if jointly else search.table(rows, best_by))
    notes = halving.joint_notes(rows, best_by) if jointly else search.notes(rows, best_by, low, high)
    for note in notes:
        print(f"note: {note}")
    print(f"\n{out}:\n{block}", end="")
