"""What happens when Snakemake reads the workflow: nothing that changes a file unless jobs are to run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from nrcg import tracking
from nrcg.config import Config
from nrcg.files import join_group, remove_leftovers
from nrcg.pipeline.integrity import refuse_damaged_sources, set_aside_damaged

LOCK = ".nrcg/snakemake.lock"
LOOKING = {
    *("--lint", "--list", "-l", "--list-rules", "--list-target-rules", "--lt", "--summary", "-S", "--detailed-summary"),
    *("-D", "--dag", "--rulegraph", "--filegraph", "--d3dag", "--unlock", "--report", "--print-compilation"),
    *("-n", "--dry-run", "--dryrun"),
}
"""Flags of Snakemake with which no job runs."""
SYNC_SECONDS = 60


def only_looks(arguments: Sequence[str], dry_run: bool) -> bool:
    """Whether Snakemake was called to look at the workflow and not to run it.

    Args:
        arguments: Its command line.
        dry_run: What it made of `-n` (also as part of `-nq`).
    """
    return dry_run or any(argument.partition("=")[0] in LOOKING for argument in arguments)


def prepare(config: Config, *, only_looks: bool) -> None:
    """Make the working directory ready, before Snakemake looks at its files.

    Undone is what a kill leaves, while no other Snakemake is alive in this folder: Snakemake's lock, which would want
    `snakemake --unlock`, and half-written files. Damaged samples are set aside, so that they are made anew. With
    damaged data or models nothing starts, since Snakemake would delete what was made of them.

    Args:
        config: The whole configuration.
        only_looks: Change nothing.

    Raises:
        DataError: Data or weights are damaged.
    """
    datasets = sorted({experiment.dataset.name for experiment in config.experiments.values()})

    def clear_up() -> None:
        for leftover in Path(".snakemake/locks").glob("*.lock"):
            leftover.unlink(missing_ok=True)
        for name in ("data", "models", "results", ".nrcg"):
            remove_leftovers(name)
        refuse_damaged_sources(Path(), datasets=datasets, experiments=config.experiments)
        for line in set_aside_damaged(Path()):
            print(f"nrcg: {line}", file=sys.stderr)

    if only_looks:
        refuse_damaged_sources(Path(), datasets=datasets, experiments=config.experiments)
    else:
        join_group(LOCK, alone=clear_up)


def job_prefix(deployment: Collection[object]) -> str:
    """What stands before each rule's command.

    `nrcg` is found without an activated environment, except where Snakemake deploys the software. `exec` lets the job
    take the shell's place, so that it is Snakemake's child and ends with it, also when that is killed by kill -9.

    Args:
        deployment: Snakemake's deployment methods.
    """
    path = "" if deployment else f'PATH="{Path(sys.executable).parent}:$PATH" '
    return f"export {path}NRCG_WORKFLOW=$PPID; exec "


def send_leftovers() -> None:
    """Close the tracking runs that a kill left, and send what a server that was down has missed; with a limit, since no
    trouble of the store may stop the workflow."""
    try:
        _track("--sync", timeout=SYNC_SECONDS)
    except subprocess.TimeoutExpired:
        print("nrcg: warning: runs of before are not all sent yet; send them by: nrcg track --sync", file=sys.stderr)


def finish_tracking(status: str) -> None:
    """End the invocation's tracking runs and send what is left."""
    _track("--finish", os.environ["NRCG_INVOCATION"], "--status", status)


def _track(*arguments: str, timeout: float | None = None) -> None:
    """`nrcg track` as a process of its own, where there is something to send."""
    if tracking.is_left_behind():
        command = [sys.executable, "-m", "nrcg.cli", "track", *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=timeout, check=False)
