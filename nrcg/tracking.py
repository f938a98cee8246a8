"""Experiment tracking: the only module that knows MLflow.

Every job is one run. The store is `sqlite:///<working directory>/mlflow.db` unless MLFLOW_TRACKING_URI names another;
NRCG_TRACKING=off switches tracking off. A job never fails because of its tracking: it warns once and goes on.
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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg import __version__
from nrcg.config import fingerprint

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# MLflow's limits (mlflow.utils.validation); a longer text is refused.
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100

FLUSH_SECONDS = 10.0
RETRY_SECONDS = 60.0
MAX_WAITING = 100_000
"""Metrics kept while the store is out of reach; the oldest go first."""
LOCK_SECONDS = 60.0

_warned = False


class NullRun:
    """The interface of a run where nothing is tracked."""

    id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Ignore the metrics."""

    def log_artifact(self, path: str | os.PathLike, folder: str | None = None) -> None:
        """Ignore the file."""


class Run(NullRun):
    """A run under way. Failures of the store are reported once and never raised."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.id = run_id
        self._client = client
        self._waiting: list[tuple[str, float, int, int]] = []  # key, value, time in ms, step
        self._infinite: set[str] = set()
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers under their names; they are sent in pieces, every ten seconds at most.

        Infinite values are stored as NaN, and the tag nrcg.infinite_metrics names them: MLflow would store
        1.8e308, which flattens every chart.

        Args:
            metrics: name to number (anything that float() takes).
            step: position on the chart's axis; None counts as 0.
        """
        now = int(time.time() * 1000)
        for name, number in metrics.items():
            value = float(number)
            if math.isinf(value):
                self._infinite.add(name)
                value = math.nan
            self._waiting.append((_clean_key(name), value, now, int(step or 0)))
        if time.monotonic() >= self._next_flush:
            self._flush()

    def log_artifact(self, path: str | os.PathLike, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts.

        Args:
            path: an existing file.
            folder: where among the artifacts; None: at their top.
        """
        with _reported():
            self._client.log_artifact(self.id, os.fspath(path), folder)

    def _flush(self) -> None:
        from mlflow.entities import Metric

        sent = False
        with _reported():
            while self._waiting:
                batch = [Metric(*entry) for entry in self._waiting[:METRICS_PER_BATCH]]
                self._client.log_batch(self.id, metrics=batch)
                del self._waiting[:METRICS_PER_BATCH]
            sent = True
        del self._waiting[:-MAX_WAITING]
        self._next_flush = time.monotonic() + (FLUSH_SECONDS if sent else RETRY_SECONDS)

    def _end(self, status: str, error: BaseException | None) -> None:
        self._flush()
        with _reported():
            if self._infinite:
                self._client.set_tag(self.id, "nrcg.infinite_metrics", ", ".join(sorted(self._infinite))[:MAX_TAG])
            if error is not None:
                self._client.set_tag(self.id, "nrcg.error", f"{type(error).__name__}: {error}"[:MAX_TAG])
            self._client.set_terminated(self.id, status)


@contextlib.contextmanager
def run(
    experiment: str,
    name: str,
    *,
    kind: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> Iterator[NullRun]:
    """Track what the body of the with statement does as one MLflow run.

    The run ends FINISHED, FAILED (the body raised; the exception goes on) or KILLED (Ctrl-C, or an exit with status
    130 or 143). At its start, runs of the same experiment that processes of this host left RUNNING when they died
    are marked KILLED, and older runs of the same name get the tag nrcg.superseded_by with the new run's id.

    Args:
        experiment: MLflow experiment; created where it is missing.
        name: the run's name, such as "sample robust scale 10".
        kind: the step, such as "train_ddpm"; the tag nrcg.kind.
        params: settings, nested as they like; logged flat with dots, cut off at MLflow's limits.
        tags: further tags. Always set: nrcg.kind, nrcg.git_commit, nrcg.config_hash, nrcg.version, nrcg.host,
            nrcg.pid, and nrcg.seed if the params hold one seed.

    Yields:
        An object with `id` (str, "" if nothing is tracked), `log_metrics` and `log_artifact`.
    """
    active = NullRun()
    if os.environ.get("NRCG_TRACKING", "").lower() not in ("off", "0", "false", "no"):
        with _reported():
            active = _start(experiment, name, kind, params, tags or {})
    try:
        yield active
    except BaseException as error:
        if isinstance(active, Run):
            active._end(_status(error), error)
        raise
    if isinstance(active, Run):
        active._end("FINISHED", None)


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


def _start(experiment: str, name: str, kind: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Run:
    uri = _prepare_environment()
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    # Alembic and urllib3 would write a line per migration and retry into the job's log.
    for logger in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with _locked(Path(".nrcg") / "mlflow.lock"):
        client = MlflowClient(uri)
        experiment_id = _get_or_create_experiment(client, experiment, uri)
    _sweep_dead_runs(client, experiment_id)
    older = _search(client, experiment_id, f"attributes.run_name = {_quoted(name)}")
    flat = flatten(params)
    run_tags = _standard_tags(kind, params, flat) | {key: _cut(str(value), MAX_TAG) for key, value in tags.items()}
    run_id = client.create_run(experiment_id, run_name=name, tags=run_tags).info.run_id
    entries = [Param(key, value) for key, value in flat.items()]
    for start in range(0, len(entries), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + PARAMS_PER_BATCH])
    for other in older:
        if "nrcg.superseded_by" not in other.data.tags:
            client.set_tag(other.info.run_id, "nrcg.superseded_by", run_id)
    return Run(client, run_id)


def _prepare_environment() -> str:
    """Set what MLflow reads when it is imported, unless the user did; return the store's URI."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A server that is down would hold up each job for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


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


def _get_or_create_experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None  # a server knows where its artifacts belong
        if uri.startswith("sqlite:"):
            location = (Path.cwd() / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
        return client.create_experiment(name, artifact_location=location)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _search(client: MlflowClient, experiment_id: str, query: str) -> list:
    return list(client.search_runs([experiment_id], filter_string=query, max_results=1000))


def _sweep_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark runs KILLED whose process is gone: after kill -9 nobody else ends them."""
    query = f"attributes.status = 'RUNNING' and tags.`nrcg.host` = {_quoted(socket.gethostname())}"
    for other in _search(client, experiment_id, query):
        tags = other.data.tags
        if not _is_alive(tags.get("nrcg.pid", ""), tags.get("nrcg.process_started", "")):
            client.set_terminated(other.info.run_id, "KILLED")


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


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn a failure of the store into one line on stderr per process. Nothing of MLflow may stop a job, so this
    catches every Exception; Ctrl-C goes through."""
    global _warned
    try:
        yield
    except Exception as error:
        if _warned:
            return
        _warned = True
        where = os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db"
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        line = f"nrcg: warning: tracking by MLflow at {where} fails, the job goes on without: {_cut(text, 300)}"
        print(re.sub(r"//[^/@\s]*@", "//", line), file=sys.stderr, flush=True)  # no passwords in logs
