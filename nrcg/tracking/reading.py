"""What MLflow holds of an experiment: the rows of its newest runs, and the address of its charts."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Any

from nrcg.tracking.store import is_off, quoted, reachable, tracking_uri, without_password

KIND_METHOD = "evaluate"


def read_rows(experiment: str, branch: str | None = None) -> list[dict[str, Any]]:
    """Metrics of each method and scale from the newest finished run of each method, as a metrics.csv holds them.

    Args:
        experiment: its name.
        branch: of git; None: any, the newest run of a method wins.

    Returns:
        A row per method and scale, with `mlflow_run_id` and `uid`, of its journal; empty where the store has none or
        tracking is off.

    Raises:
        NrcgError: the store cannot be reached; one line.
    """
    uri = tracking_uri()
    if is_off("NRCG_TRACKING"):
        return []
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []  # connecting would create it
    store = reachable(uri)
    found = store.client.get_experiment_by_name(experiment)
    if found is None:
        return []
    of_branch = "" if branch is None else f" and tags.`nrcg.git_branch` = {quoted(branch)}"
    query = f" and attributes.status = 'FINISHED'{of_branch}"
    methods, settings = (
        store.search([found.experiment_id], f"tags.`nrcg.kind` = '{kind}'{query}") for kind in (KIND_METHOD, "sample")
    )
    newest: dict[str, str] = {}
    for run in methods:
        if "nrcg.superseded_by" not in run.data.tags:
            newest.setdefault(run.data.tags["method"], run.info.run_id)
    rows = []
    for run in settings:
        method = run.data.tags.get("method", "")
        if run.data.tags.get("mlflow.parentRunId") == newest.get(method, ""):
            row = {"experiment": experiment, "method": method, "scale": float(run.data.params["scale"])}
            rows.append(row | run.data.metrics | {"mlflow_run_id": run.info.run_id, "uid": run.data.tags["nrcg.uid"]})
    return sorted(rows, key=lambda row: (list(newest).index(row["method"]), row["scale"]))


def charts_url(experiment: str) -> str:
    """The page of MLflow that draws the methods over their scales, "" where the store has no such experiment.

    Raises NrcgError, one line, where the store cannot be reached.
    """
    uri = tracking_uri()
    found = reachable(uri).client.get_experiment_by_name(experiment)
    if found is None:
        return ""
    host = without_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    query = f"tags.`nrcg.kind` = '{KIND_METHOD}' and tags.`nrcg.superseded_by` IS NULL"
    # Sorted by time, the page would fold the methods into their parents.
    order = "orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
    page = f"/#/experiments/{found.experiment_id}/runs"
    return f"{host}{page}?searchFilter={urllib.parse.quote(query)}&{order}&compareRunsMode=CHART"
