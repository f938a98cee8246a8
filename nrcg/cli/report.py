"""Verbs about results: the comparison table, and MLflow."""

from __future__ import annotations

import argparse
import sys

from nrcg.cli.arguments import Verbs, add_verb
from nrcg.errors import NrcgError


def add_compare(verbs: Verbs) -> None:
    sub = add_verb(verbs, "compare", compare)
    sub.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: quickstart; REVISION:EXPERIMENT: of a git branch"
    )
    sub.add_argument("--files", action="store_true", help="from metrics.csv, without MLflow")


def compare(arguments: argparse.Namespace) -> None:
    """Print the comparison table of experiments, from MLflow or from metrics.csv."""
    from nrcg.report.tables import format_comparison, format_table
    from nrcg.steps.compare import read_source

    sources = arguments.experiments or ["quickstart"]
    tables, notes = {}, []
    for source in sources:
        tables[source], note = read_source(source, files=arguments.files)
        notes.append(f"{source}: {note}")
    print(format_table(tables[sources[0]]) if len(tables) == 1 else format_comparison(tables))
    print("", *notes, sep="\n")


def add_track(verbs: Verbs) -> None:
    sub = add_verb(verbs, "track", track)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--sync", action="store_true", help="send what is missing")
    what.add_argument("--finish", metavar="INVOCATION", help="end the parent run; the workflow's last step")
    sub.add_argument("--status", choices=("FINISHED", "FAILED", "KILLED"), default="FINISHED", help="with --finish")


def track(arguments: argparse.Namespace) -> int:
    """Send to MLflow what is missing there, after the store was down or a job was killed."""
    from nrcg import tracking

    if arguments.finish:
        # At a workflow's end, which must not fail by its tracking.
        try:
            done = tracking.finish_invocation(arguments.finish, arguments.status)
        except NrcgError as error:
            print(f"nrcg: warning: {error}", file=sys.stderr)
            return 0
    else:
        done = tracking.sync()
        print(f"{done.runs} run{'' if done.runs == 1 else 's'} sent" if done.runs else "nothing is missing")
    for line in done.failed:
        print(f"nrcg: not sent: {line}", file=sys.stderr)
    return int(bool(done.failed) and not arguments.finish)
