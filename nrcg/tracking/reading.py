"""TODO tracking.reading."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg.tracking.store import KIND_METHOD, KIND_SETTING, _is_off, _quoted, _reachable, _without_password, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun


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
    if _is_off("NRCG_TRACKING"):
        return []
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []  # connecting would create it
    client = _reachable(uri).client
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []

    def finished(kind: str) -> list[StoredRun]:
        query = f"tags.`nrcg.kind` = '{kind}' and attributes.status = 'FINISHED'"
        if branch is not None:
            query += f" and tags.`nrcg.git_branch` = {_quoted(branch)}"
        order, page, token = ["attributes.start_time DESC"], [], None
        while True:
            part = client.search_runs([found.experiment_id], query, max_results=1000, order_by=order, page_token=token)
            page += part
            token = part.token
            if not token:
                return page

    newest: dict[str, str] = {}
    for method_run in finished(KIND_METHOD):
        if "nrcg.superseded_by" not in method_run.data.tags:
            newest.setdefault(method_run.data.tags["method"], method_run.info.run_id)
    rows = []
    for setting in finished(KIND_SETTING):
        method = setting.data.tags.get("method", "")
        if setting.data.tags.get("mlflow.parentRunId") == newest.get(method, ""):
            row = {"experiment": experiment, "method": method, "scale": float(setting.data.params["scale"])}
            known = {"mlflow_run_id": setting.info.run_id, "uid": setting.data.tags.get("nrcg.uid", "")}
            rows.append(row | setting.data.metrics | known)
    return sorted(rows, key=lambda row: (list(newest).index(row["method"]), row["scale"]))


def charts_url(experiment: str) -> str:
    """The page of MLflow that draws the methods over their scales, "" where the store has no such experiment.

    Raises:
        NrcgError: the store cannot be reached; one line.
    """
    uri = tracking_uri()
    found = _reachable(uri).client.get_experiment_by_name(experiment)
    if found is None:
        return ""
    host = _without_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    query = f"tags.`nrcg.kind` = '{KIND_METHOD}' and tags.`nrcg.superseded_by` IS NULL"
    # Sorted by time, the page would fold the methods into their parents.
    order = "orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
    page = f"/#/experiments/{found.experiment_id}/runs"
    return f"{host}{page}?searchFilter={urllib.parse.quote(query)}&{order}&compareRunsMode=CHART"
