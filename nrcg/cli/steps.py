"""The steps of the workflow as verbs: each calls one function of nrcg.steps, whose parameters are its flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nrcg.cli.arguments import Verbs, add_files, add_verb, positive, run_step
from nrcg.config import BEST_BY, DENSITIES, ROLES
from nrcg.layout import REFERENCE_CACHE

DATA = {"data": "data/<dataset>"}
DDPM = {"ddpm": "models/<experiment>/ddpm"}
CLASSIFIERS = {"classifiers": "models/<experiment>/classifiers"}
CACHE = {"cache": f"folder of the features; default {REFERENCE_CACHE}"}
TABLES = {name: f"results/<experiment>/{name}.csv" for name in ("forward", "metrics")}
RECORD = "results/<experiment>/objectives/<objective>.json"
SAMPLES = {"samples": "results/<experiment>/samples"}


@dataclass(frozen=True)
class StepVerb:
    """A verb that calls one function of nrcg.steps.

    Attributes:
        function: MODULE.NAME in nrcg.steps.
        step: Key of `nrcg.config.STEPS`, whose settings it takes.
        text: What it does.
        files: Flag -> help, of the files and folders that it needs.
        optional: Likewise, of those that it can do without.
        compute: Whether it computes with torch.
    """

    function: str
    step: str
    text: str
    files: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    compute: bool = False


VERBS = {
    "dataset": StepVerb(
        "dataset.make_dataset",
        "dataset",
        "Make a data set: draw it, or read, check and convert raw images.",
        {"out": "data/<dataset>"},
    ),
    "train-classifier": StepVerb(
        "train_classifier.train_classifier",
        "train_classifier",
        "Train one classifier, or take a pretrained one.",
        DATA | {"out": "models/<experiment>/classifiers/<role>"},
        compute=True,
    ),
    "forward": StepVerb(
        "forward.analyse_forward",
        "forward",
        "Forward analysis: figs. 1 to 4.",
        DATA | DDPM | CLASSIFIERS | {"out": "results/<experiment>/forward.csv"},
        compute=True,
    ),
    "reference": StepVerb(
        "reference.describe_reference",
        "reference",
        "What every method is compared with: features of the training images, and how good the classifiers are.",
        DATA | CLASSIFIERS | {"out": "results/<experiment>/reference.json"},
        CACHE,
        compute=True,
    ),
    "objective": StepVerb(
        "objective.measure_objective",
        "objective",
        "Measure one training objective of a grid: likelihood, samples, guidance, gradients.",
        DATA | {"ddpm": "models/<experiment>/objectives/<objective>"} | CLASSIFIERS | {"out": RECORD},
        CACHE,
        compute=True,
    ),
    "explain-shard": StepVerb(
        "explain_shard.explain_shard",
        "explain",
        "Explain a shard of an experiment's validation images in one of its ways.",
        DATA | DDPM | CLASSIFIERS | {"out": "results/<experiment>/explanations/<explainer>/shard<number>.npz"},
        compute=True,
    ),
    "evaluate-explanations": StepVerb(
        "evaluate_explanations.measure_explanations",
        "evaluate_explanations",
        "Metrics of one way to explain.",
        DATA | DDPM | CLASSIFIERS | {"out": "results/<experiment>/explanations/<explainer>.csv"},
        CACHE,
        compute=True,
    ),
    "figures": StepVerb(
        "figures.draw_figures",
        "report",
        "Draw the figures.",
        TABLES | SAMPLES | {"out": "results/<experiment>/figures"},
    ),
    "report": StepVerb(
        "report.make_report",
        "report",
        "Write the self-contained HTML report.",
        TABLES
        | SAMPLES
        | {
            "figures": "results/<experiment>/figures",
            "models": "models/<experiment>",
            "out": "results/<experiment>/report.html",
        },
        {
            "reference": "results/<experiment>/reference.json",
            "comparison": "results/<experiment>/paper_comparison.md",
        },
    ),
}


def add_step(verbs: Verbs, name: str) -> None:
    """Declare one of VERBS."""
    verb = VERBS[name]
    sub = add_verb(verbs, name, partial(_run, verb), text=verb.text, step=True, compute=verb.compute)
    add_files(sub, **verb.files)
    add_files(sub, required=False, **verb.optional)
    if name == "dataset":
        sub.add_argument("--threads", type=positive, help="CPU threads")
    if name in ("explain-shard", "evaluate-explanations"):
        sub.add_argument("--explainer", metavar="NAME", help="a key of explain.methods")
    if name == "explain-shard":
        sub.add_argument("--shard", type=int, required=True, help="number of the shard, from 0")
    if name == "evaluate-explanations":
        sub.add_argument("--shards", type=Path, nargs="+", required=True, help="the shards, in order")
    if name == "objective":
        sub.add_argument("--objective", metavar="NAME", help="which of the grid")
    if name == "train-classifier":
        sub.add_argument("--role", choices=ROLES, help="which of the experiment's classifiers")


def _run(verb: StepVerb, arguments: argparse.Namespace) -> None:
    parts = (getattr(arguments, name, None) for name in ("role", "objective", "explainer"))
    part = next(filter(None, parts), None)
    run_step(arguments, verb.function, verb.step, part, verb.compute)


def add_objectives_table(verbs: Verbs) -> None:
    sub = add_verb(verbs, "objectives-table", objectives_table)
    sub.add_argument("--records", type=Path, nargs="+", required=True, help=RECORD)
    add_files(sub, out="results/<experiment>/objectives")


def objectives_table(arguments: argparse.Namespace) -> None:
    """Compare the training objectives of a grid: table, figure and samples."""
    from nrcg.steps.objectives import compare_objectives

    compare_objectives(arguments.records, out=arguments.out)


def add_explanations_table(verbs: Verbs) -> None:
    sub = add_verb(verbs, "explanations-table", explanations_table)
    tables = "results/<experiment>/explanations/<explainer>.csv"
    sub.add_argument("--tables", type=Path, nargs="+", required=True, help=tables)
    add_files(sub, out="results/<experiment>/explanations")


def explanations_table(arguments: argparse.Namespace) -> None:
    """Compare the ways to explain: table, figures, pictures."""
    from nrcg.steps.explanations_table import compare_explanations

    compare_explanations(arguments.tables, out=arguments.out)


def add_density(verbs: Verbs) -> None:
    sub = add_verb(verbs, "density", density, compute=True)
    sub.add_argument("--config", required=True, help="config.yaml, or a step's settings file")
    sub.add_argument("--density", required=True, metavar="NAME", help="one of densities.names")
    add_files(sub, out="results/densities/<density>.csv", models="models/densities/<density>")
    sub.set_defaults(experiment=DENSITIES)


def density(arguments: argparse.Namespace) -> None:
    """Learn a distribution whose density is known by each objective; bound and ODE beside the truth."""
    run_step(arguments, "density.measure_density", "density", arguments.density)


def add_densities_table(verbs: Verbs) -> None:
    sub = add_verb(verbs, "densities-table", densities_table)
    sub.add_argument("--tables", type=Path, nargs="+", required=True, help="results/densities/<density>.csv")
    add_files(sub, out="results/densities")


def densities_table(arguments: argparse.Namespace) -> None:
    """Join the distributions whose density is known: table, figures, page."""
    from nrcg.steps.densities_table import compare_densities

    compare_densities(arguments.tables, out=arguments.out)


def add_collect(verbs: Verbs) -> None:
    sub = add_verb(verbs, "collect", collect)
    sub.add_argument("--metrics", type=Path, nargs="+", required=True, help="results/<experiment>/metrics/*.csv")
    add_files(sub, out="results/<experiment>/metrics.csv")
    add_files(sub, required=False, summary="results/<experiment>/summary.json")
    sub.add_argument("--best-by", choices=BEST_BY, default="cfid", help="rule for the best scale")


def collect(arguments: argparse.Namespace) -> None:
    """Join the methods' metrics into metrics.csv and summary.json."""
    from nrcg.steps.collect import collect

    collect(arguments.metrics, out=arguments.out, best_by=arguments.best_by, summary=arguments.summary)
