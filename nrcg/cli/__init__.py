"""The `nrcg` command: one verb for each step of the pipeline, and the sampler for anybody's models.

This package alone knows the command line and the configuration files. Each module holds a group of verbs with their
arguments. Heavy libraries are imported by the verb that needs them, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nrcg import __version__
from nrcg.cli import evaluate, explain, likelihood, publish, report, sample, steps, train, workflow
from nrcg.errors import NrcgError
from nrcg.layout import COMPILED
from nrcg.pipeline.remedies import explained
from nrcg.processes import end_with_parent

DISK_ERRORS = {
    errno.ENOSPC: "free some space there and run it again",
    errno.EDQUOT: "free some space there and run it again",
    errno.EROFS: "nothing can be written there",
    errno.EACCES: "give yourself the right to it",
}
"""Errors of the disk -> their remedy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake prints one line and returns 1."""
    _die_with_parent()
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    if getattr(arguments, "threads", None):
        # Read by the matrix libraries when they are loaded, so before any import of them.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(arguments.threads)
    # Threads that wait without spinning: beside another busy process, spinning ones make a job several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(COMPILED).resolve()))
    try:
        return arguments.verb(arguments) or 0
    except NrcgError as error:
        print(f"nrcg: {explained(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe such as `nrcg compare | head` has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"nrcg: {error.filename or 'a file'}: {error.strerror}; {DISK_ERRORS[error.errno]}", file=sys.stderr)
        return 1


def _die_with_parent() -> None:
    """Under the workflow a job ends with its parent: after a kill -9 of Snakemake it must not write on.

    NRCG_WORKFLOW holds the parent's process number. The processes of a training end with the one that launched them.
    """
    launcher = str(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
    parent = launcher or os.environ.get("NRCG_WORKFLOW")
    if parent:
        end_with_parent(int(parent))


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nrcg: {message}; see: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nrcg", description="Classifier guidance for non-robust classifiers.")
    parser.add_argument("--version", action="version", version=f"nrcg {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    # In the order of `nrcg --help`.
    workflow.add_run(verbs)
    workflow.add_plan(verbs)
    workflow.add_validate(verbs)
    workflow.add_schema(verbs)
    workflow.add_adopt(verbs)
    report.add_compare(verbs)
    report.add_track(verbs)
    train.add_export_ddpm(verbs)
    train.add_export_classifier(verbs)
    steps.add_step(verbs, "dataset")
    train.add_train_ddpm(verbs)
    steps.add_step(verbs, "train-classifier")
    steps.add_step(verbs, "forward")
    sample.add_sample(verbs)
    publish.add_publish(verbs)
    steps.add_step(verbs, "reference")
    evaluate.add_evaluate(verbs)
    evaluate.add_tune(verbs)
    likelihood.add_likelihood(verbs)
    likelihood.add_likelihood_table(verbs)
    steps.add_step(verbs, "objective")
    steps.add_objectives_table(verbs)
    steps.add_density(verbs)
    steps.add_densities_table(verbs)
    explain.add_explain(verbs)
    steps.add_step(verbs, "explain-shard")
    steps.add_step(verbs, "evaluate-explanations")
    steps.add_explanations_table(verbs)
    steps.add_collect(verbs)
    steps.add_step(verbs, "figures")
    steps.add_step(verbs, "report")
    return parser
