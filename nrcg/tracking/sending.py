"""Sending what journals hold to an MLflow store. Each entry may be sent again, should its answer get lost."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nrcg.errors import NrcgError
from nrcg.files import atomic_write_text, weights_sha256
from nrcg.tracking.invocations import invocation_tags, is_alive
from nrcg.tracking.journal import DAMAGED, ENDING, Journal, left_behind
from nrcg.tracking.store import Store, is_off, one_line, quoted, reachable, tracking_uri

MAX_DIGEST = 36
"""Characters; this and what a batch holds are MLflow's limits (mlflow.utils.validation)."""
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
JOURNALS = Path(".nrcg") / "tracking"
INVOCATION_ENDING = ".invocation"
"""Of the file of an invocation of which jobs were tracked: empty, at its end its status; then its time is the end."""


@dataclass
class Sync:
    """What `sync` did: journals sent to their end, and those refused by the store or damaged, with the reason."""

    runs: int = 0
    failed: tuple[str, ...] = ()


def is_left_behind() -> bool:
    """Whether `sync` may have something to do, unless tracking is off; cheap. What a living process logs counts too."""
    endings = {path.suffix for path in JOURNALS.glob("*")}
    return not is_off("NRCG_TRACKING") and not endings.isdisjoint((ENDING, INVOCATION_ENDING))


def sync() -> Sync:
    """Send what ended or killed processes left in their journals; nothing is sent twice.

    To MLFLOW_TRACKING_URI where it is set, else to the store each journal names. A damaged journal is set aside as
    NAME.damaged once its whole lines are sent.

    Raises:
        NrcgError: a store cannot be reached; one line. The journals stay.
    """
    runs, failed = 0, []
    for journal in left_behind(JOURNALS):
        try:
            known = bool(journal.entries) and journal.entries[0]["op"] == "start"
            if known:
                _send_whole(journal)
                runs += 1
            journal.remove()
            if journal.damage:
                sent = "its other lines were sent" if known else "which run it is of is not known"
                failed.append(f"{journal.path}: {journal.damage}; {sent}; set aside as {journal.path.name}{DAMAGED}")
        except NrcgError:
            raise
        except Exception as error:
            failed.append(f"{journal.path}: {one_line(error)}")
        finally:
            journal.close()
    for path in sorted(JOURNALS.glob(f"*{INVOCATION_ENDING}")):
        try:
            _end_invocation(path)
        except NrcgError:
            raise
        except Exception as error:
            failed.append(f"{path}: {one_line(error)}")
    return Sync(runs, tuple(failed))


def finish_invocation(invocation: str, status: str) -> Sync:
    """End an invocation's parent runs as FINISHED, FAILED or KILLED, and send what its jobs left to be sent."""
    path = JOURNALS / f"{invocation}{INVOCATION_ENDING}"
    if not path.exists():  # no job was tracked
        return Sync()
    atomic_write_text(path, status)
    return sync()


def _end_invocation(path: Path) -> None:
    """Give an invocation that is over its final status: as its file says, else KILLED."""
    invocation, status = path.name.removesuffix(INVOCATION_ENDING), path.read_text(errors="replace")
    tags = invocation_tags(invocation)
    if status not in ("FINISHED", "FAILED", "KILLED"):
        if tags["nrcg.host"] != socket.gethostname() or is_alive(tags):
            return
        status = "KILLED"
    store = reachable(tracking_uri())
    experiments = [found.experiment_id for found in store.client.search_experiments()]
    for found in store.invocations(experiments, invocation):
        store.client.set_terminated(found.info.run_id, status, int(path.stat().st_mtime * 1000))
    path.unlink(missing_ok=True)


def _send_whole(journal: Journal) -> None:
    """Send the journal of a process that is gone."""
    start, last = journal.entries[0], journal.entries[-1]
    store = reachable(os.environ.get("MLFLOW_TRACKING_URI") or start["uri"])
    if journal.run_id and store.find(store.experiment(start["experiment"]), journal.uid) != journal.run_id:
        journal.mark_sent(0, "")  # begun in another store: this one gets all of it
    if last["op"] != "end":
        journal.append("end", time=last["time"], status="KILLED", tags={})
    send(journal, store)


def send(journal: Journal, store: Store) -> None:
    """Send the entries that are not in the store yet."""
    if not journal.run_id:
        journal.mark_sent(1, _begin(journal, store))
    start, waiting, run_id = journal.entries[0], journal.entries[journal.sent :], journal.run_id
    _send_metrics(store, run_id, (entry for entry in waiting if entry["op"] == "metrics"))
    for entry in waiting:
        match entry["op"]:
            case "artifact":
                store.client.log_artifact(run_id, entry["path"], entry["folder"])
            case "dataset":
                _send_dataset(store, run_id, entry)
            case "model":
                _send_model(store, run_id, start, entry)
            case "end":
                _send_end(store, run_id, start, entry)
    if waiting:
        journal.mark_sent(len(journal.entries), run_id)


def _begin(journal: Journal, store: Store) -> str:
    """Make the journal's run, or find it; its id."""
    from mlflow.entities import Param

    start = journal.entries[0]
    experiment_id = store.experiment(start["experiment"])
    run_id = store.find(experiment_id, journal.uid)
    if not run_id:
        tags, parent = dict(start["tags"]), ""
        if start["parent"]:
            parent = store.find(experiment_id, start["parent"])
        elif start["invocation"]:
            parent = store.invocation(experiment_id, start["invocation"])
        if parent:
            tags["mlflow.parentRunId"] = parent
        created = store.client.create_run(experiment_id, start_time=start["time"], run_name=start["name"], tags=tags)
        run_id = created.info.run_id
    params = [Param(key, value) for key, value in start["params"].items()]
    for first in range(0, len(params), PARAMS_PER_BATCH):
        store.client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH])
    return run_id


def _send_metrics(store: Store, run_id: str, entries: Iterable[dict]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, one["time"], one["step"]) for one in entries for name, value in one["values"].items()
    ]
    for first in range(0, len(metrics), METRICS_PER_BATCH):
        store.client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_BATCH])


def _send_dataset(store: Store, run_id: str, entry: dict) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def tensor(dtype: str, shape: list[int]) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])

    spec = {"features": tensor("uint8", [-1, *entry["shape"][1:]]), "targets": tensor("int64", [-1])}
    profile = {"num_images": entry["shape"][0], "classes": entry["classes"], "images_sha256": entry["sha256"]}
    dataset = Dataset(
        name=entry["name"],
        digest=entry["sha256"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": entry["path"]}),
        schema=json.dumps({"mlflow_tensorspec": spec}),
        profile=json.dumps(profile),
    )
    store.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", entry["context"])])])


def _send_model(store: Store, run_id: str, start: dict, entry: dict) -> None:
    """Export the weights of a folder and log them. What cannot be exported is named in the tag nrcg.model_error."""
    from mlflow.entities import LoggedModelOutput

    from nrcg.tracking.models import export_model

    experiment_id, path = store.experiment(start["experiment"]), Path(entry["path"])
    query = f"source_run_id = '{run_id}' and name = {quoted(entry['name'])}"
    if any(str(model.status) == "READY" for model in store.client.search_logged_models([experiment_id], query)):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if weights_sha256(path) != entry["sha256"]:
                raise ValueError(f"{path} holds other weights now")
            export_model(path, Path(folder) / "model")
        except Exception as error:
            store.client.set_tag(run_id, "nrcg.model_error", f"{type(error).__name__}: {error}")
            return
        model = store.client.create_logged_model(
            experiment_id, entry["name"], source_run_id=run_id, tags={"sha256": entry["sha256"]}
        )
        store.client.log_model_artifacts(model.model_id, os.fspath(Path(folder) / "model"))
        store.client.finalize_logged_model(model.model_id, "READY")
        store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _send_end(store: Store, run_id: str, start: dict, end: dict) -> None:
    for key, value in end["tags"].items():
        store.client.set_tag(run_id, key, value)
    if end["status"] == "FINISHED":
        _supersede(store, run_id, start)
    store.client.set_terminated(run_id, end["status"], end["time"])


def _supersede(store: Store, run_id: str, start: dict[str, Any]) -> None:
    """The newest of the finished runs of a name and branch, mostly this one, replaces the others that are over."""
    branch = start["tags"]["nrcg.git_branch"]
    query = f"attributes.run_name = {quoted(start['name'])} and tags.`nrcg.git_branch` = {quoted(branch)}"
    found = store.search([store.experiment(start["experiment"])], query)
    finished = [run for run in found if run.info.status == "FINISHED" or run.info.run_id == run_id]
    newest = max(finished, key=lambda run: (run.info.start_time, run.info.run_id == run_id))
    replaced = [
        run.info.run_id
        for run in found
        if (run.info.status != "RUNNING" or run.info.run_id == run_id)
        and run.info.start_time <= newest.info.start_time
        and run is not newest
        and "nrcg.superseded_by" not in run.data.tags
    ]
    for other in replaced:
        store.client.set_tag(other, "nrcg.superseded_by", newest.info.run_id)
    if replaced:
        before = newest.data.tags.get("nrcg.supersedes")
        store.client.set_tag(newest.info.run_id, "nrcg.supersedes", ",".join(filter(None, [before, *replaced])))
