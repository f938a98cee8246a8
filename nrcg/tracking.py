"""Experiment tracking: the only module that knows MLflow.

Every job is one run, below the run of the Snakemake invocation that started it. The store is
`sqlite:///<working directory>/mlflow.db` unless MLFLOW_TRACKING_URI names another; NRCG_TRACKING=off switches tracking
off. A job never fails because of its tracking: what it logs is journalled (nrcg/journal.py) before it is sent, and
where the store is down the job warns once and goes on. `sync` sends what is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg import __version__
from nrcg.config import fingerprint
from nrcg.errors import NrcgError
from nrcg.files import atomic_write_text
from nrcg.journal import DAMAGED, ENDING, Journal, left_behind

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from torch import nn

# MLflow's limits (mlflow.utils.validation); a longer text is refused.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_DIGEST = 36
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100

STEPS_PER_SCALE = 1000
"""MLflow's steps are whole numbers and guidance scales are not: step 50 is scale 0.05."""

FLUSH_SECONDS = 10.0
RETRY_SECONDS = 60.0
LOCK_SECONDS = 60.0

JOURNALS = Path(".nrcg") / "tracking"
INVOCATION_ENDING = ".invocation"
KIND_INVOCATION = "invocation"
KIND_METHOD = "evaluate"
KIND_SETTING = "sample"

_warned = False
_enclosing: list[Run] = []
"""Runs of this process that are open, the innermost last."""


class NullRun:
    """The interface of a run where nothing is tracked."""

    id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Ignore the metrics."""

    def log_artifact(self, path: str | os.PathLike, folder: str | None = None) -> None:
        """Ignore the file."""

    def log_dataset(
        self,
        *,
        name: str,
        path: str | os.PathLike,
        sha256: str,
        shape: Sequence[int],
        classes: Sequence[str],
        context: str,
    ) -> None:
        """Ignore the data set."""

    def log_model(self, path: str | os.PathLike, name: str) -> None:
        """Ignore the model."""


class Run(NullRun):
    """A run under way. Failures of the store are reported once and never raised."""

    def __init__(self, journal: Journal, uri: str, *, deferred: bool) -> None:
        self._journal, self._uri, self._deferred = journal, uri, deferred
        self._infinite: set[str] = set()
        self._next_send = 0.0

    @property
    def id(self) -> str:  # type: ignore[override]
        """MLflow's id of the run; before the store has answered, "pending-<value of the tag nrcg.uid>"."""
        return self._journal.run_id or f"pending-{self._journal.uid}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers under their names; they are sent in pieces, every ten seconds at most.

        Infinite values are stored as NaN, and the tag nrcg.infinite_metrics names them: MLflow would store
        1.8e308, which flattens every chart.

        Args:
            metrics: name to number (anything that float() takes).
            step: position on the chart's axis; None counts as 0.
        """
        values = {_clean_key(name): float(number) for name, number in metrics.items()}
        self._infinite |= {name for name, value in values.items() if math.isinf(value)}
        values = {name: math.nan if math.isinf(value) else value for name, value in values.items()}
        self._log("metrics", values=values, step=int(step or 0))

    def log_artifact(self, path: str | os.PathLike, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts.

        Args:
            path: an existing file.
            folder: where among the artifacts; None: at their top.
        """
        with _reported(self._uri):
            self._log("artifact", path=self._journal.keep(path), folder=folder)

    def log_dataset(
        self,
        *,
        name: str,
        path: str | os.PathLike,
        sha256: str,
        shape: Sequence[int],
        classes: Sequence[str],
        context: str,
    ) -> None:
        """Log a data set as an input of the run, in MLflow's sense.

        Args:
            name: such as "sportballs24/train".
            path: its folder.
            sha256: of the images; its first 36 digits are MLflow's digest.
            shape: (N, H, W, C) of the images.
            classes: their names.
            context: what it is for, such as "training".
        """
        self._log(
            "dataset",
            name=name,
            path=os.fspath(Path(path).absolute()),
            sha256=sha256,
            shape=list(shape),
            classes=list(classes),
            context=context,
        )

    def log_model(self, path: str | os.PathLike, name: str) -> None:
        """Log a model in MLflow's sense: `mlflow.pytorch.load_model("models:/<id>")` opens it.

        It is exported as a graph (torch.export), so that whoever opens it runs no code from a file and needs no nrcg.
        A classifier takes images (B, C, H, W) in [-1, 1]; a U-Net takes x_t and t (B,) and gives its prediction.
        NRCG_LOG_MODELS=off leaves models out.

        Args:
            path: a folder as `nrcg train-ddpm` or `nrcg train-classifier` writes it.
            name: of the logged model.
        """
        if not _is_off("NRCG_LOG_MODELS"):
            self._log("model", path=os.fspath(Path(path).absolute()), name=name, sha256=_weights_sha256(Path(path)))

    def _log(self, op: str, **fields: Any) -> None:
        with _reported(self._uri):
            self._journal.append(op, time=_now(), **fields)
        if not self._deferred and time.monotonic() >= self._next_send:
            self._send()

    def _send(self) -> None:
        sent = False
        with _reported(self._uri):
            _send(self._journal, _connect(self._uri))
            sent = True
        self._next_send = time.monotonic() + (FLUSH_SECONDS if sent else RETRY_SECONDS)

    def _end(self, status: str, error: BaseException | None) -> None:
        tags = {}
        if self._infinite:
            tags["nrcg.infinite_metrics"] = _cut(", ".join(sorted(self._infinite)), MAX_TAG)
        if error is not None:
            tags["nrcg.error"] = _cut(f"{type(error).__name__}: {error}", MAX_TAG)
        with _reported(self._uri):
            self._journal.append("end", time=_now(), status=status, tags=tags)
            if not self._deferred:
                _send(self._journal, _connect(self._uri))
                self._journal.remove()
        self._journal.close()


@contextlib.contextmanager
def run(
    experiment: str,
    name: str,
    *,
    kind: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    deferred: bool = False,
) -> Iterator[NullRun]:
    """Track what the body of the with statement does as one MLflow run.

    It is a child of the run around it, or else of the Snakemake invocation that NRCG_INVOCATION names. It ends
    FINISHED, FAILED (the body raised; the exception goes on) or KILLED (Ctrl-C, or an exit with status 130 or 143).
    At its start, runs of the same experiment that processes of this host left RUNNING when they died are marked
    KILLED. Once FINISHED it replaces the older runs of the same name and git branch: they get the tag
    nrcg.superseded_by with its id, and it gets nrcg.supersedes.

    Args:
        experiment: MLflow experiment; created where it is missing.
        name: the run's name, such as "robust scale 10".
        kind: the step, such as "train"; the tag nrcg.kind.
        params: settings, nested as they like; logged flat with dots, cut off at MLflow's limits.
        tags: further tags. Always set: nrcg.uid, nrcg.kind, nrcg.git_commit, nrcg.git_branch, nrcg.config_hash,
            nrcg.version, nrcg.host, nrcg.pid, and nrcg.seed if the params hold one seed.
        deferred: send nothing now but at the end of the invocation, so that a short job need not load MLflow. Has no
            effect outside an invocation.

    Yields:
        An object with `id` (str, "" if nothing is tracked), `log_metrics`, `log_artifact`, `log_dataset`, `log_model`.
    """
    active = NullRun()
    if not _is_off("NRCG_TRACKING"):
        with _reported(tracking_uri()):
            active = _start(experiment, name, kind, params, tags or {}, deferred)
    if not isinstance(active, Run):
        yield active
        return
    _enclosing.append(active)
    try:
        yield active
    except BaseException as error:
        active._end(_status(error), error)
        raise
    else:
        active._end("FINISHED", None)
    finally:
        _enclosing.remove(active)


def log_method_over_scales(method_run: NullRun, rows: Iterable[Mapping[str, Any]], best: Mapping[str, float]) -> None:
    """Log a method's numbers over its guidance scales as one curve per metric.

    Args:
        method_run: the run of the method.
        rows: one mapping per scale, with `scale`; texts are left out.
        best: numbers at the best scale, logged as `best/<name>`: MLflow's tables show the last step of a curve, which
            is the highest scale.
    """
    method_run.log_metrics({f"best/{name}": value for name, value in best.items()})
    for row in rows:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        method_run.log_metrics(numbers, step=scale_step(row["scale"]))


def scale_step(scale: float) -> int:
    """The step at which a guidance scale stands: 1000 times the scale."""
    return round(STEPS_PER_SCALE * scale)


def tracking_uri() -> str:
    """The store: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow params: {"ddpm": {"seed": 0}} becomes {"ddpm.seed": "0"}.

    Lists become JSON; null, true and false are written as in YAML. Keys have at most 250 and values at most 6000
    characters; characters that MLflow refuses in a key become underscores.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[_clean_key(path)] = _cut(text, MAX_PARAM)
    return flat


def _start(
    experiment: str, name: str, kind: str, params: Mapping[str, Any], tags: Mapping[str, str], deferred: bool
) -> Run:
    uri, flat = tracking_uri(), flatten(params)
    invocation = os.environ.get("NRCG_INVOCATION", "")
    journal = Journal.create(JOURNALS)
    standard = _standard_tags(kind, params, flat) | {"nrcg.uid": journal.uid}
    if invocation:
        (JOURNALS / f"{invocation}{INVOCATION_ENDING}").touch()
        standard["nrcg.invocation"] = invocation
    journal.append(
        "start",
        time=_now(),
        uri=re.sub(r"//[^/@]*@", "//", uri),  # no passwords on disk
        experiment=experiment,
        name=name,
        params=flat,
        tags=standard | {key: _cut(str(value), MAX_TAG) for key, value in tags.items()},
        parent=_enclosing[-1]._journal.uid if _enclosing else "",
        invocation=invocation,
    )
    active = Run(journal, uri, deferred=deferred and bool(invocation))
    if not active._deferred:
        active._send()
    return active


# --- Invocations of Snakemake ------------------------------------------------------------------------------------


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


# --- Sending ----------------------------------------------------------------------------------------------------


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


def _send_model(store: _Store, run_id: str, start: dict, entry: dict) -> None:
    """Export the weights of a folder and log them. What cannot be exported is named in the tag nrcg.model_error."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = store.experiment(start["experiment"])
    query = f"source_run_id = '{run_id}' and name = {_quoted(entry['name'])}"
    if any(str(model.status) == "READY" for model in store.client.search_logged_models([experiment_id], query)):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if _weights_sha256(Path(entry["path"])) != entry["sha256"]:
                raise ValueError(f"{entry['path']} holds other weights now")
            exported = Path(folder) / "model"
            _export_model(Path(entry["path"]), exported)
        except Exception as error:
            store.client.set_tag(run_id, "nrcg.model_error", _cut(f"{type(error).__name__}: {error}", MAX_TAG))
            return
        model = store.client.create_logged_model(
            experiment_id, entry["name"], source_run_id=run_id, tags={"sha256": entry["sha256"]}
        )
        store.client.log_model_artifacts(model.model_id, os.fspath(exported))
        store.client.finalize_logged_model(model.model_id, "READY")
        store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _export_model(path: Path, out: Path) -> None:
    """Write a trained model's folder as an MLflow model."""
    import warnings

    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    module, inputs = _load_module(path)
    with torch.no_grad():
        output = module(*inputs.values())

    def spec(tensor: torch.Tensor, name: str | None = None) -> TensorSpec:
        return TensorSpec(np.dtype(str(tensor.dtype).removeprefix("torch.")), (-1, *tensor.shape[1:]), name)

    named = [spec(tensor, name if len(inputs) > 1 else None) for name, tensor in inputs.items()]
    signature = ModelSignature(inputs=Schema(named), outputs=Schema([spec(output)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            module,
            os.fspath(out),
            signature=signature,
            input_example=tuple(inputs.values()),
            serialization_format="pt2",  # a graph; the other format is a pickle
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )


def _load_module(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model on the CPU, and an input of batch size 2 by the names of its arguments."""
    import torch
    from torch import nn

    if (path / "unet").is_dir():
        from diffusers import UNet2DModel

        class NoisePrediction(nn.Module):
            """The U-Net with a plain tensor as its output."""

            def __init__(self, unet: nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return self.unet(x_t, t, return_dict=False)[0]

        unet = UNet2DModel.from_pretrained(path / "unet").eval()
        shape = (2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        return NoisePrediction(unet), {"x_t": torch.zeros(shape), "t": torch.tensor([1, 2])}
    from nrcg.classifiers import load_classifier, read_classifier_config

    config = read_classifier_config(path)
    shape = (2, config.get("channels", 3), config["image_size"], config["image_size"])
    return load_classifier(path), {"x": torch.zeros(shape)}


def _weights_sha256(path: Path) -> str:
    """As the model's own record states it."""
    record = path / "training.json" if (path / "unet").is_dir() else path / "config.json"
    return json.loads(record.read_text())["sha256"]


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


# --- Reading ----------------------------------------------------------------------------------------------------


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


# --- Helpers ----------------------------------------------------------------------------------------------------


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


def _standard_tags(kind: str, params: Mapping[str, Any], flat: Mapping[str, str]) -> dict[str, str]:
    commit = git_commit()
    tags = {
        "nrcg.kind": kind,
        "nrcg.git_commit": commit,
        "nrcg.git_branch": git_branch(),
        "nrcg.config_hash": fingerprint(_jsonable(params)),
        "nrcg.version": __version__,
        "nrcg.host": socket.gethostname(),
        "nrcg.pid": str(os.getpid()),
        "nrcg.process_started": _process_start(os.getpid()),
        "mlflow.source.git.commit": commit,  # the column of MLflow's table
    }
    seeds = [value for key, value in flat.items() if key == "seed" or key.endswith(".seed")]
    if "seed" in flat or len(seeds) == 1:
        tags["nrcg.seed"] = flat.get("seed", seeds[0])
    return tags


def git_commit() -> str:
    """HEAD of the working directory's checkout, "-dirty" behind it if tracked files differ; else "unknown"."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git_branch() -> str:
    """The checked-out branch, or the name of the DVC experiment that runs; "unknown" without a checkout."""
    try:
        return os.environ.get("DVC_EXP_NAME") or _git("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git_file(revision: str, path: str) -> str | None:
    """A file's text at a git revision; None where it has none."""
    try:
        return _git("show", f"{revision}:./{path}") + "\n"
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    # Without the optional lock, so that a run never gets in the way of the user's own git.
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _status(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return "FINISHED"
        return "KILLED" if error.code in (130, 143) else "FAILED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _jsonable(value: Any) -> Any:
    """Settings as plain JSON values, so that equal settings have equal hashes."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


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
