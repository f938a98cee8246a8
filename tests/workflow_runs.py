"""Runs of Snakemake in copies of the repository, for tests."""

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def snakemake(
    tree: Path, *arguments: str, toy: dict | None = None, methods: dict | None = None
) -> subprocess.CompletedProcess:
    """Run Snakemake untracked, with changes laid over the toy experiment and over the methods."""
    change = {"experiments": {"toy": toy or {}}} | ({"methods": methods} if methods else {})
    (tree / "change.json").write_text(json.dumps(change))
    return subprocess.run(
        command(*arguments, "--configfile", "toy.yaml", "change.json"),
        cwd=tree,
        env=os.environ | {"NRCG_TRACKING": "off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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
