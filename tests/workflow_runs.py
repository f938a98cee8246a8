"""Runs of Snakemake in copies of the repository, for tests."""

import contextlib
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from forks import Forks

from nrcg import config

ROOT = Path(__file__).parents[1]
CONFIG = config.load(ROOT / "config.yaml")


def copy_tree(folder: Path) -> Path:
    """What the workflow needs of the repository, and the toy experiment."""
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    (folder / "profiles").symlink_to("workflow/profiles")
    for name in ("Snakefile", "config.yaml", "tests/data/toy.yaml"):
        shutil.copy(ROOT / name, folder)
    return folder


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "snakemake"), *arguments]


SNAKEMAKE = Forks(
    "from snakemake import api, cli\nfrom nrcg.evaluation import features\n"
    "from nrcg.pipeline import resources, startup, targets",
    HF_HUB_OFFLINE="1",
)


def run_snakemake(tree: Path, *arguments: str, tracking: str = "off") -> subprocess.CompletedProcess:
    """Snakemake's command line in a folder, where it is tracked in mlflow.db there; stdout holds stderr too."""
    code = f"import os, sys; from snakemake import cli; os.environ['NRCG_TRACKING'] = {tracking!r}; "
    (run,) = SNAKEMAKE.run(tree, code + "sys.exit(cli.main(sys.argv[1:]))", arguments)
    return run


def snakemake(
    tree: Path, *arguments: str, toy: dict | None = None, methods: dict | None = None, tracking: str = "off"
) -> subprocess.CompletedProcess:
    """The same with changes laid over the toy experiment and over the methods."""
    change = {"experiments": {"toy": toy or {}}} | ({"methods": methods} if methods else {})
    (tree / "change.json").write_text(json.dumps(change))
    return run_snakemake(tree, *arguments, "--configfile", "toy.yaml", "change.json", tracking=tracking)


def planned(output: str) -> dict[str, int]:
    """Jobs per rule of a dry run, without the targets; empty where nothing is to be done."""
    if "Job stats:" not in output:
        assert "Nothing to be done" in output, output
        return {}
    table = output.split("Job stats:")[1].split("total")[0]
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    return {name: count for name, count in counts.items() if name not in (*CONFIG.experiments, "toy", "all")}


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").resolve() == folder.resolve():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
