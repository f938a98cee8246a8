"""Verbs that show results: tables, figures, the report, MLflow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nrcg.cli.arguments import Verbs, add_verb, read_settings
from nrcg.config import BEST_BY
from nrcg.errors import NrcgError


def add_collect(verbs: Verbs) -> None:
    sub = add_verb(verbs, "collect", collect)
    sub.add_argument("--metrics", nargs="+", required=True, help="results/<experiment>/metrics/*.csv")
    sub.add_argument("--out", required=True, help="results/<experiment>/metrics.csv")
    sub.add_argument("--best-by", choices=BEST_BY, default="cfid", help="rule for the best scale")
    sub.add_argument("--summary", help="results/<experiment>/summary.json")


def collect(arguments: argparse.Namespace) -> None:
    """Join the methods' metrics into metrics.csv and summary.json."""
    from nrcg.steps.collect import collect

    collect(
        list(map(Path, arguments.metrics)),
        out=Path(arguments.out),
        best_by=arguments.best_by,
        summary=arguments.summary and Path(arguments.summary),
    )


def add_figures(verbs: Verbs) -> None:
    sub = add_verb(verbs, "figures", figures, step=True)
    _add_report_arguments(sub)


def figures(arguments: argparse.Namespace) -> None:
    """Draw the figures."""
    from nrcg.steps.figures import draw_figures

    draw_figures(read_settings(arguments, "report"), **_paths(arguments, "forward", "metrics", "samples", "out"))


def add_report(verbs: Verbs) -> None:
    sub = add_verb(verbs, "report", report, step=True)
    _add_report_arguments(sub)
    sub.add_argument("--figures", required=True, help="results/<experiment>/figures")
    sub.add_argument("--models", required=True, help="models/<experiment>")
    sub.add_argument("--reference", help="results/<experiment>/reference.json")
    sub.add_argument("--comparison", help="results/<experiment>/paper_comparison.md")


def report(arguments: argparse.Namespace) -> None:
    """Write the self-contained HTML report."""
    from nrcg.steps.report import make_report

    names = ("forward", "metrics", "samples", "figures", "models", "out", "reference", "comparison")
    make_report(read_settings(arguments, "report"), **_paths(arguments, *names))


def _paths(arguments: argparse.Namespace, *names: str) -> dict[str, Path | None]:
    """Flags of files and folders, by their names."""
    given = {name: getattr(arguments, name) for name in names}
    return {name: None if path is None else Path(path) for name, path in given.items()}


def _add_report_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--forward", required=True, help="results/<experiment>/forward.csv")
    sub.add_argument("--metrics", required=True, help="results/<experiment>/metrics.csv")
    sub.add_argument("--samples", required=True, help="results/<experiment>/samples")
    sub.add_argument("--out", required=True)


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
