"""The rows that experiments are compared by, from MLflow or from metrics.csv."""

from __future__ import annotations

import os
import sys

from nrcg import tracking
from nrcg.errors import DataError, NrcgError
from nrcg.layout import ExperimentPaths, format_scale
from nrcg.provenance import git_branch, git_file
from nrcg.report.columns import frechet_columns, parse_metrics, read_metrics


def read_source(source: str, files: bool) -> tuple[list[dict], str]:
    """Rows of EXPERIMENT or REVISION:EXPERIMENT and where they come from: MLflow's newest runs of that branch where
    they are those of its metrics.csv, in the working tree or at the revision; else that file's."""
    revision, _, experiment = source.rpartition(":")
    branch, rows, reason = revision or git_branch(), [], ""
    if not files:
        try:
            rows = _with_distances(tracking.read_rows(experiment, branch))
        except NrcgError as error:
            print(f"nrcg: {error}; reading {ExperimentPaths(experiment).metrics}", file=sys.stderr)
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
    return rows if rows and frechet_columns(rows) else []


def _read_file(experiment: str, revision: str) -> tuple[list[dict], str]:
    """metrics.csv of the working tree or of a git revision, and where it is. Raises DataError."""
    path = ExperimentPaths(experiment).metrics.as_posix()
    if not revision:
        return read_metrics(path), path
    text = git_file(revision, path)
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
