"""The workflow from outside: its configuration, its cost, running it and taking over its files."""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg.cli.arguments import Verbs, add_verb, device_flag, print_table
from nrcg.cli.imports import lean_imports
from nrcg.config import DENSITIES, config_reference, dvc_yaml, get_experiment, json_schema, load, read_yaml
from nrcg.devices import device_name
from nrcg.errors import DataError
from nrcg.files import atomic_write_text
from nrcg.layout import DatasetPaths, ExperimentPaths
from nrcg.processes import processors

START_SECONDS = 10.0
"""CPU seconds that a job's interpreter and libraries take to start."""

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from nrcg.config import ExperimentConfig
    from nrcg.pipeline.plan import Costs, Step


def add_run(verbs: Verbs) -> None:
    sub = add_verb(verbs, "run", run)
    sub.add_argument("experiment", nargs="?", default="quickstart")
    sub.add_argument("snakemake", nargs=argparse.REMAINDER, help="further arguments for Snakemake")


def run(arguments: argparse.Namespace) -> int:
    """Run Snakemake with bars instead of pages of log."""
    from nrcg.pipeline.plan import job_weights, make_plan
    from nrcg.pipeline.watch import PLUGIN, watch

    config = load("config.yaml")
    weights = {} if arguments.experiment == DENSITIES else job_weights(make_plan(config, arguments.experiment))
    _use_this_environment()
    # The target stands first: --resources takes every word after it.
    command = ["snakemake", arguments.experiment, "--cores", "all", "--resources", "gpu=1", *arguments.snakemake]
    log = Path("logs") / f"{arguments.experiment}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    code = watch([*command, "--logger", PLUGIN], log, weights=weights)
    if code == 0 and not {"-n", "--dry-run"} & set(arguments.snakemake):
        _print_results(arguments.experiment)
    return code


def _print_results(experiment: str) -> None:
    from nrcg.report.columns import read_metrics
    from nrcg.report.tables import format_table

    paths = ExperimentPaths(experiment)
    if experiment != DENSITIES:
        print(format_table(read_metrics(paths.metrics)))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    used, jobs = spent.ru_utime + spent.ru_stime, _benchmarked(experiment)
    print(f"\nCPU time of this run: {used:,.0f} s; of its jobs by benchmarks/{experiment}/**/*.tsv: {jobs:,.0f} s")
    if paths.report.exists():
        print(f"Report: {paths.report.resolve()}")


def _benchmarked(experiment: str) -> float:
    """CPU seconds of an experiment's jobs. Snakemake looks at a job each half minute: the last seconds are missing."""
    rows = []
    for path in Path("benchmarks", experiment).rglob("*.tsv"):
        with path.open(newline="") as file:
            rows += csv.DictReader(file, delimiter="\t")
    return sum(float(row["cpu_time"]) for row in rows if row["cpu_time"] not in ("NA", "-"))


def add_plan(verbs: Verbs) -> None:
    sub = add_verb(verbs, "plan", plan)
    sub.add_argument("experiment", nargs="?", default="quickstart")
    sub.add_argument("--config", default="config.yaml")
    sub.add_argument("--device", type=device_flag, help="auto, cpu, cuda, cuda:N; default: the config's")
    sub.add_argument(
        "--no-measure", dest="measure", action="store_false", help="only count: answers at once, without hours"
    )


def plan(arguments: argparse.Namespace) -> None:
    """Estimate an experiment before it starts: jobs, images, U-Net passes, hours, disk."""
    from nrcg.pipeline.plan import image_counts, make_plan
    from nrcg.pipeline.plan_table import plan_notes, plan_rows

    with lean_imports():
        from nrcg.pipeline.timing import count_parameters, meta_unet

    config = load(arguments.config)
    settings = get_experiment(config, arguments.experiment)
    unet = meta_unet(settings, ExperimentPaths(arguments.experiment).ddpm)
    parameters = count_parameters(settings, unet)
    counts = image_counts(settings.dataset, DatasetPaths(settings.dataset.name))
    steps = make_plan(config, arguments.experiment, counts=counts, parameters=parameters)
    costs = _measured(arguments, settings, steps, unet) if arguments.measure else None
    print_table(plan_rows(steps, costs))
    print()
    for note in plan_notes(settings, steps, costs, counts, parameters):
        print(note)


def _measured(
    arguments: argparse.Namespace, settings: ExperimentConfig, steps: Sequence[Step], unet: UNet2DModel | None
) -> Costs:
    """What is counted costs on the device at hand."""
    from nrcg.devices import resolve_device, resolve_precision
    from nrcg.pipeline.plan import Costs
    from nrcg.pipeline.timing import measure

    print("measuring ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    device = resolve_device(arguments.device or settings.device)
    precision = resolve_precision(settings.precision, device, unet_weights=settings.unet_weights)
    counted = sorted({name for step in steps for name in step.work})
    costs, notes = measure(settings, counted, unet=unet, device=device, precision=precision)
    cores = processors() if device.type == "cpu" else None
    name = f"{cores} CPU cores" if cores else f"one {device_name(device)}"
    seconds = time.perf_counter() - began
    how = f"hours: measured in {seconds:.0f} s on {name}, U-Net in {str(precision).removeprefix('torch.')}"
    return Costs(costs | {"start": START_SECONDS}, name, cores, [how, *notes])


def add_validate(verbs: Verbs) -> None:
    sub = add_verb(verbs, "validate", validate)
    sub.add_argument("--config", default="config.yaml")


def validate(arguments: argparse.Namespace) -> None:
    """Check config.yaml."""
    config = load(arguments.config)
    print(f"{arguments.config}: valid; experiments: {', '.join(config.experiments)}")


def add_schema(verbs: Verbs) -> None:
    sub = add_verb(verbs, "schema", schema)
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--dvc", action="store_true", help="dvc.yaml, for the experiments that --experiment names")
    kind.add_argument("--docs", action="store_true", help="docs/config.md, every key in words")
    sub.add_argument("--config", default="config.yaml", help="configuration that --dvc and --docs are about")
    sub.add_argument("--experiment", nargs="+", default=["quickstart"], metavar="NAME", help="experiments of dvc.yaml")
    sub.add_argument("--out", help="where to; default: config.schema.json, dvc.yaml or docs/config.md")


def schema(arguments: argparse.Namespace) -> None:
    """Write what is made from the models of config.yaml: its JSON schema for editors, dvc.yaml or docs/config.md."""
    if arguments.dvc:
        out, text = "dvc.yaml", dvc_yaml(read_yaml(arguments.config), arguments.experiment)
    elif arguments.docs:
        out, text = "docs/config.md", config_reference(read_yaml(arguments.config))
    else:
        out, text = "config.schema.json", json.dumps(json_schema(), indent=2) + "\n"
    atomic_write_text(Path(arguments.out or out), text)


def add_adopt(verbs: Verbs) -> None:
    add_verb(verbs, "adopt", adopt)


def adopt(arguments: argparse.Namespace) -> None:
    """Take over the files that `dvc pull` brought: checks their checksums and settings against dvc.lock, then tells
    Snakemake that they are up to date."""
    from nrcg.config import read_yaml
    from nrcg.pipeline.integrity import refuse_damaged_sources

    _use_this_environment()
    settings = load("config.yaml").experiments
    refuse_damaged_sources(Path(), datasets={one.dataset.name for one in settings.values()}, experiments=settings)
    status = subprocess.run(["dvc", "status", "--json"], capture_output=True, text=True)
    try:
        stale = json.loads(status.stdout)
    except ValueError:
        raise DataError(f"dvc status fails: {' '.join((status.stderr or status.stdout).split())[-500:]}") from None
    if stale:
        raise DataError(
            f"files or settings are not those of dvc.lock, in the stages {', '.join(stale)}; nothing was taken over. "
            "See `dvc status`; `dvc pull` brings missing files, `dvc repro` makes them anew"
        )
    experiments = [name for entry in read_yaml("dvc.yaml")["vars"] for name in entry.get("experiments", ())]
    touched = subprocess.run(
        # The workflow's own profile prints every command.
        ["snakemake", *experiments, "--touch", "--forceall", "--cores", "1", "--quiet", "all"],
        capture_output=True,
        text=True,
    )
    if touched.returncode:
        raise DataError(f"snakemake --touch fails: {' '.join((touched.stdout + touched.stderr).split())[-500:]}")
    print(f"up to date: {', '.join(experiments)}")


def _use_this_environment() -> None:
    """Snakemake and DVC of this environment, also where it is not activated."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
