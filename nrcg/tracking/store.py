"""TODO tracking.store."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg import __version__
from nrcg.errors import NrcgError
from nrcg.files import atomic_write_text
from nrcg.provenance import git_branch
from nrcg.tracking.journal import DAMAGED, ENDING, Journal, left_behind

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun


# MLflow's limits (mlflow.utils.validation); a longer text is refused.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_DIGEST = 36
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
LOCK_SECONDS = 60.0
JOURNALS = Path(".nrcg") / "tracking"
INVOCATION_ENDING = ".invocation"
KIND_INVOCATION = "invocation"
KIND_METHOD = "evaluate"
KIND_SETTING = "sample"
_warned = False


def tracking_uri() -> str:
    """The store: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def new_invocation() -> str:
    """A name for this process as an invocation, for NRCG_INVOCATION: time, host, process number and its start."""
    pid = os.getpid()
    return f"{time.strftime('%Y%m%dT%H%M%S')}_{socket.gethostname()}_{pid}_{_process_start(pid)}"


def finish_invocation(invocation: str, status: str) -> Sync:
    """End an invocation's parent runs and send what its jobs left to be sent.

    Args:
        invocation: as `new_invocation` named it.
        status: FINISHED, FAILED or KILLED.
    """
    path = JOURNALS / f"{invocation}{INVOCATION_ENDING}"
    if not path.exists():  # no job was tracked
        return Sync()
    atomic_write_text(path, json.dumps({"status": status, "time": _now()}))
    return sync()


def _invocation_tags(invocation: str) -> dict[str, str]:
    host, pid, started = invocation.partition("_")[2].rsplit("_", 2)
    return {
        "nrcg.kind": KIND_INVOCATION,
        "nrcg.invocation": invocation,
        "nrcg.host": host,
        "nrcg.pid": pid,
        "nrcg.process_started": started,
        "nrcg.git_branch": git_branch(),
        "nrcg.version": __version__,
    }


@dataclass
class Sync:
    """What `sync` did.

    Attributes:
        runs: journals sent to their end.
        failed: journals that the store refused or that were damaged, with the reason.
    """

    runs: int = 0
    failed: tuple[str, ...] = ()


def is_left_behind() -> bool:
    """Whether `sync` may have something to do, unless tracking is off; cheap. What a living process logs counts too."""
    return not _is_off("NRCG_TRACKING") and any(
        path.suffix in (ENDING, INVOCATION_ENDING) for path in JOURNALS.glob("*")
    )


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
                _send_whole(journal, _reachable(os.environ.get("MLFLOW_TRACKING_URI") or journal.entries[0]["uri"]))
                runs += 1
            else:
                journal.damage = journal.damage or "line 1: is no start"
                journal.remove()
            if journal.damage:
                sent = "its other lines were sent" if known else "which run it is of is not known"
                failed.append(f"{journal.path}: {journal.damage}; {sent}; set aside as {journal.path.name}{DAMAGED}")
        except NrcgError:
            raise
        except Exception as error:
            failed.append(f"{journal.path}: {_one_line(error)}")
        finally:
            journal.close()
    for path in JOURNALS.glob(f"*{INVOCATION_ENDING}"):
        try:
            _end_invocation(path)
        except NrcgError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            path.replace(f"{path}{DAMAGED}")  # its run is ended as that of any dead process
            failed.append(f"{path}: {_one_line(error)}; set aside as {path.name}{DAMAGED}")
        except Exception as error:
            failed.append(f"{path}: {_one_line(error)}")
    return Sync(runs, tuple(failed))


def _reachable(uri: str) -> _Store:
    try:
        store = _connect(uri)
        store.client.search_experiments(max_results=1)
        return store
    except Exception as error:
        raise NrcgError(
            f"MLflow at {_without_password(uri)} cannot be reached ({_one_line(error)}); what is not sent is kept, "
            f"{_remedy(uri, error)}"
        ) from error


def _end_invocation(path: Path) -> None:
    """Give an invocation that is over its final status."""
    invocation = path.name.removesuffix(INVOCATION_ENDING)
    tags = _invocation_tags(invocation)
    text = path.read_text()
    if not text:
        if tags["nrcg.host"] != socket.gethostname() or _is_alive(tags["nrcg.pid"], tags["nrcg.process_started"]):
            return
        text = json.dumps({"status": "KILLED", "time": int(path.stat().st_mtime * 1000)})
    end = json.loads(text)
    if end["status"] not in ("FINISHED", "FAILED", "KILLED") or not isinstance(end["time"], int):
        raise ValueError("has changed since it was written")
    client = _reachable(tracking_uri()).client
    experiments = [found.experiment_id for found in client.search_experiments()]
    query = f"tags.`nrcg.invocation` = {_quoted(invocation)} and tags.`nrcg.kind` = '{KIND_INVOCATION}'"
    for found in client.search_runs(experiments, filter_string=query):
        client.set_terminated(found.info.run_id, end["status"], end["time"])
    path.unlink(missing_ok=True)


_stores: dict[str, _Store] = {}


def _connect(uri: str) -> _Store:
    if uri not in _stores:
        _stores[uri] = _Store(uri)
    return _stores[uri]


class _Store:
    """An MLflow store and what this process knows of it."""

    def __init__(self, uri: str) -> None:
        # Read by MLflow when it is imported; what the user has set stays.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # A server that is down would hold up each job for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.tracking import MlflowClient

        # Alembic and urllib3 would write a line per migration and retry into the job's log.
        for logger in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        self.uri = uri
        with _locked(Path(".nrcg") / "mlflow.lock"):
            self.client = MlflowClient(uri)
        self._experiments: dict[str, str] = {}
        self._parents: dict[tuple[str, str], str] = {}

    def experiment(self, name: str) -> str:
        """Id of an experiment; where it is met for the first time, runs of dead processes in it are ended."""
        if name not in self._experiments:
            with _locked(Path(".nrcg") / "mlflow.lock"):
                experiment_id = self._get_or_create(name)
            self._sweep(experiment_id)
            self._experiments[name] = experiment_id
        return self._experiments[name]

    def search(self, experiment_id: str, query: str) -> list[StoredRun]:
        return list(self.client.search_runs([experiment_id], filter_string=query, max_results=1000))

    def find(self, experiment_id: str, uid: str) -> str:
        """Id of the run of a journal, "" where there is none."""
        found = self.search(experiment_id, f"tags.`nrcg.uid` = '{uid}'")
        return found[0].info.run_id if found else ""

    def invocation(self, experiment_id: str, invocation: str) -> str:
        """Id of the parent run of an invocation's jobs."""
        key = (experiment_id, invocation)
        if key not in self._parents:
            query = f"tags.`nrcg.invocation` = {_quoted(invocation)} and tags.`nrcg.kind` = '{KIND_INVOCATION}'"
            with _locked(Path(".nrcg") / "mlflow.lock"):
                found = self.search(experiment_id, query)
                if found:
                    self._parents[key] = found[0].info.run_id
                else:
                    begun = time.mktime(time.strptime(invocation.partition("_")[0], "%Y%m%dT%H%M%S"))
                    name = time.strftime("snakemake %Y-%m-%d %H:%M:%S", time.localtime(begun))
                    created = self.client.create_run(
                        experiment_id, start_time=int(begun * 1000), run_name=name, tags=_invocation_tags(invocation)
                    )
                    self._parents[key] = created.info.run_id
        return self._parents[key]

    def _get_or_create(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = None  # a server knows where its artifacts belong
            if self.uri.startswith("sqlite:"):
                location = (Path.cwd() / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
            # Without the tag the page opens with its columns and panels for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return self.client.create_experiment(name, artifact_location=location, tags=kind)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _sweep(self, experiment_id: str) -> None:
        """Mark runs KILLED whose process is gone: after kill -9 nobody else ends them."""
        query = f"attributes.status = 'RUNNING' and tags.`nrcg.host` = {_quoted(socket.gethostname())}"
        for other in self.search(experiment_id, query):
            tags = other.data.tags
            if not _is_alive(tags.get("nrcg.pid", ""), tags.get("nrcg.process_started", "")):
                self.client.set_terminated(other.info.run_id, "KILLED")


def _send_whole(journal: Journal, store: _Store) -> None:
    """Send the journal of a process that is gone, and remove it."""
    start, last = journal.entries[0], journal.entries[-1]
    if journal.run_id and store.find(store.experiment(start["experiment"]), journal.uid) != journal.run_id:
        journal.mark_sent(0, "")  # begun in another store: this one gets all of it
    if last["op"] != "end":
        journal.append("end", time=last["time"], status="KILLED", tags={})
    _send(journal, store)
    journal.remove()


def _send(journal: Journal, store: _Store) -> None:
    """Send the entries that are not in the store yet. Each may be sent again, should its answer get lost."""
    if not journal.run_id:
        journal.mark_sent(1, _begin(journal, store))
    waiting = journal.entries[journal.sent :]
    _send_metrics(store, journal.run_id, [entry for entry in waiting if entry["op"] == "metrics"])
    for entry in waiting:
        if entry["op"] == "artifact":
            store.client.log_artifact(journal.run_id, entry["path"], entry["folder"])
        elif entry["op"] == "dataset":
            _send_dataset(store, journal.run_id, entry)
        elif entry["op"] == "model":
            from nrcg.tracking.models import _send_model

            _send_model(store, journal.run_id, journal.entries[0], entry)
    if waiting and waiting[-1]["op"] == "end":
        _send_end(store, journal.run_id, journal.entries[0], waiting[-1])
    if waiting:
        journal.mark_sent(len(journal.entries), journal.run_id)


def _begin(journal: Journal, store: _Store) -> str:
    from mlflow.entities import Param

    start = journal.entries[0]
    experiment_id = store.experiment(start["experiment"])
    run_id = store.find(experiment_id, journal.uid)
    if not run_id:
        parent = ""
        if start["parent"]:
            parent = store.find(experiment_id, start["parent"])
        elif start["invocation"]:
            parent = store.invocation(experiment_id, start["invocation"])
        tags = start["tags"] | ({"mlflow.parentRunId": parent} if parent else {})
        created = store.client.create_run(experiment_id, start_time=start["time"], run_name=start["name"], tags=tags)
        run_id = created.info.run_id
    entries = [Param(key, value) for key, value in start["params"].items()]
    for first in range(0, len(entries), PARAMS_PER_BATCH):
        store.client.log_batch(run_id, params=entries[first : first + PARAMS_PER_BATCH])
    return run_id


def _send_metrics(store: _Store, run_id: str, entries: list[dict]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, entry["time"], entry["step"])
        for entry in entries
        for name, value in entry["values"].items()
    ]
    for first in range(0, len(metrics), METRICS_PER_BATCH):
        store.client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_BATCH])


def _send_dataset(store: _Store, run_id: str, entry: dict) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def tensor(dtype: str, shape: list[int]) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])

    spec = {"features": tensor("uint8", [-1, *entry["shape"][1:]]), "targets": tensor("int64", [-1])}
    dataset = Dataset(
        name=entry["name"],
        digest=entry["sha256"][:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": entry["path"]}),
        schema=json.dumps({"mlflow_tensorspec": spec}),
        profile=json.dumps(
            {"num_images": entry["shape"][0], "classes": entry["classes"], "images_sha256": entry["sha256"]}
        ),
    )
    tags = [InputTag("mlflow.data.context", entry["context"])]
    store.client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def _send_end(store: _Store, run_id: str, start: dict, end: dict) -> None:
    for key, value in end["tags"].items():
        store.client.set_tag(run_id, key, value)
    if end["status"] == "FINISHED":
        _supersede(store, run_id, start)
    store.client.set_terminated(run_id, end["status"], end["time"])


def _supersede(store: _Store, run_id: str, start: dict) -> None:
    """A finished run replaces the older ones of its name and branch, or is replaced where it was sent late."""
    branch = start["tags"]["nrcg.git_branch"]
    query = f"attributes.run_name = {_quoted(start['name'])} and tags.`nrcg.git_branch` = {_quoted(branch)}"
    others = [
        other
        for other in store.search(store.experiment(start["experiment"]), query)
        if other.info.run_id != run_id and other.info.status != "RUNNING"
    ]
    newer = [o for o in others if o.info.start_time > start["time"] and o.info.status == "FINISHED"]
    older = [o for o in others if o.info.start_time <= start["time"] and "nrcg.superseded_by" not in o.data.tags]
    for other in older:
        store.client.set_tag(other.info.run_id, "nrcg.superseded_by", run_id)
    if older:
        store.client.set_tag(run_id, "nrcg.supersedes", _cut(",".join(o.info.run_id for o in older), MAX_TAG))
    if newer:
        first = min(newer, key=lambda other: other.info.start_time)
        store.client.set_tag(run_id, "nrcg.superseded_by", first.info.run_id)


def _is_off(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("off", "0", "false", "no")


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock: on a fresh database, processes that start at once die in the schema migration,
    and two that create the same experiment at once log to the wrong one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is held by another process for more than {LOCK_SECONDS:g} s") from None
                time.sleep(0.05)
        yield


def _is_alive(pid: str, started: str) -> bool:
    if not pid.isdigit():
        return True  # not ours to judge
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return started == _process_start(pid)


def _process_start(pid: int | str) -> str:
    """When a process started, in clock ticks since boot; "" where /proc does not say. Pids are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc(5); the name before may hold spaces


def _clean_key(key: str) -> str:
    # MLflow takes a name as a path: no leading or trailing slash, no "..".
    return _cut(re.sub(r"[^\w. /:-]", "_", key).strip("/").replace("..", "_") or "_", MAX_KEY)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _remedy(uri: str, error: BaseException) -> str:
    """How to send what a failed store did not take."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and any(words in str(error) for words in ("file is not a database", "image is malformed")):
        return f"move {Path(path).name}, which is damaged, away, then: nrcg track --sync"
    return "send it later by: nrcg track --sync"


def _one_line(error: BaseException) -> str:
    return _without_password(_cut(f"{type(error).__name__}: {error}".splitlines()[0], 300))


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextlib.contextmanager
def _reported(uri: str) -> Iterator[None]:
    """Turn a failure of the store into one line on stderr per process. Nothing of MLflow may stop a job, so this
    catches every Exception; Ctrl-C goes through."""
    global _warned
    try:
        yield
    except Exception as error:
        if _warned:
            return
        _warned = True
        where = "mlflow.db" if uri.startswith("sqlite:") else _without_password(uri)
        print(
            f"nrcg: warning: tracking by MLflow at {where} fails, the job goes on; what it logs is kept, "
            f"{_remedy(uri, error)} ({_one_line(error)})",
            file=sys.stderr,
            flush=True,
        )
