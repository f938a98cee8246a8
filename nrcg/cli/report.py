"""Verbs that show results: figures, the report, tables of experiments, MLflow."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nrcg.cli.arguments import Verbs, add_verb, read_settings
from nrcg.config import ReportStep
from nrcg.errors import DataError, NrcgError
from nrcg.layout import format_scale
from nrcg.provenance import versions


def add_figures(verbs: Verbs) -> None:
    sub = add_verb(verbs, "figures", figures, step=True)
    _add_report_arguments(sub)


def figures(arguments: argparse.Namespace) -> None:
    """Draw the figures."""
    from nrcg.report.figures import make_figures

    settings: ReportStep = read_settings(arguments, "report")
    make_figures(
        arguments.forward,
        arguments.metrics,
        arguments.samples,
        arguments.out,
        target=settings.target,
        num_classes=len(settings.classes),
    )


def add_report(verbs: Verbs) -> None:
    sub = add_verb(verbs, "report", report, step=True)
    _add_report_arguments(sub)
    sub.add_argument("--figures", required=True, help="results/<experiment>/figures")
    sub.add_argument("--models", required=True, help="models/<experiment>")
    sub.add_argument("--reference", help="results/<experiment>/reference.json")
    sub.add_argument("--comparison", help="results/<experiment>/paper_comparison.md")


def report(arguments: argparse.Namespace) -> None:
    """Write the self-contained HTML report."""
    from nrcg import tracking
    from nrcg.report.page import write_report

    settings: ReportStep = read_settings(arguments, "report")
    write_report(
        arguments.out,
        context={
            "experiment": settings.experiment,
            "description": settings.description,
            "target": settings.target,
            "classes": settings.classes,
            "T": settings.ddpm.schedule.num_train_timesteps,
            "num_samples": settings.sampling.num_samples,
            "start": settings.sampling.start,
            "dataset": settings.dataset.name,
            "source": settings.dataset.source,
            "commit": tracking.git_commit(),
            "versions": versions(),
            "settings": settings.model_dump(mode="json"),
        },
        forward_csv=arguments.forward,
        metrics_csv=arguments.metrics,
        figures_dir=arguments.figures,
        samples_dir=arguments.samples,
        models_dir=arguments.models,
        reference_json=arguments.reference,
        comparison_md=arguments.comparison,
    )
    with tracking.run(settings.experiment, "report", kind="report", params=settings.model_dump(), deferred=True) as run:
        for path in (arguments.out, arguments.forward, arguments.metrics):
            run.log_artifact(path)
        for path in sorted(Path(arguments.figures).glob("*.png")):
            run.log_artifact(path, "figures")


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

    sources = arguments.experiments or ["quickstart"]
    tables, notes = {}, []
    for source in sources:
        tables[source], note = _read_source(source, files=arguments.files)
        notes.append(f"{source}: {note}")
    print(format_table(tables[sources[0]]) if len(tables) == 1 else format_comparison(tables))
    print("", *notes, sep="\n")


def _read_source(source: str, files: bool) -> tuple[list[dict], str]:
    """Rows of EXPERIMENT or REVISION:EXPERIMENT and where they come from: MLflow's newest runs of that branch where
    they are those of its metrics.csv, in the working tree or at the revision; else that file's."""
    from nrcg import tracking

    revision, _, experiment = source.rpartition(":")
    branch, rows, reason = revision or tracking.git_branch(), [], ""
    if not files:
        try:
            rows = _with_distances(tracking.read_rows(experiment, branch))
        except NrcgError as error:
            print(f"nrcg: {error}; reading results/{experiment}/metrics.csv", file=sys.stderr)
    try:
        filed, where = _read_file(experiment, revision)
    except DataError:
        if not rows:
            raise
    else:
        reason = _missing_in_mlflow(rows, filed) if rows else ""
        if reason or not rows:
            return filed, f"{where}{reason and f', since MLflow {reason} (branch {branch})'}"
        rows = filed  # of the same runs; it knows best_by as well
    note = f"newest runs of branch {branch} in MLflow; charts: {tracking.charts_url(experiment)}"
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        note += "\n  (after: mlflow ui --backend-store-uri sqlite:///mlflow.db)"
    return rows, note


def _with_distances(rows: list[dict]) -> list[dict]:
    """The rows where a table can be made of them, else none. Raises DataError."""
    from nrcg.report.columns import frechet_columns

    return rows if rows and frechet_columns(rows) else []


def _read_file(experiment: str, revision: str) -> tuple[list[dict], str]:
    """metrics.csv of the working tree or of a git revision, and where it is. Raises DataError."""
    from nrcg import tracking
    from nrcg.report.columns import parse_metrics, read_metrics

    path = f"results/{experiment}/metrics.csv"
    if not revision:
        return read_metrics(path), path
    text = tracking.git_file(revision, path)
    if text is None:
        raise DataError(f"{revision}:{experiment}: git has no {path} at {revision}, and MLflow no finished runs of it")
    return parse_metrics(text, f"{revision}:{path}"), f"{path} of git revision {revision}"


def _missing_in_mlflow(rows: list[dict], filed: list[dict]) -> str:
    """What MLflow's rows lack of the file's, in words; empty where both are of the same runs."""
    stored = {(row["method"], row["scale"]): {row["mlflow_run_id"], f"pending-{row['uid']}"} for row in rows}
    made = {(row["method"], row["scale"]): row.get("mlflow_run_id") for row in filed}
    other = [key for key in made.keys() & stored.keys() if made[key] is not None and made[key] not in stored[key]]
    for words, keys in (
        ("lacks", made.keys() - stored.keys()),
        ("holds other runs of", other),
        ("holds beside them", stored.keys() - made.keys()),
    ):
        if keys:
            method, scale = min(keys)
            some = f"{method} scale {format_scale(scale)}"
            return f"{words} {some}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
    return ""


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
