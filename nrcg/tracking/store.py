"""The MLflow store: its experiments and runs, and what is said where it fails.

It is `sqlite:///<working directory>/mlflow.db` unless MLFLOW_TRACKING_URI names another.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg.errors import NrcgError
from nrcg.tracking.invocations import KIND_INVOCATION, begun, invocation_tags, is_alive

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun

LOCK = Path(".nrcg") / "mlflow.lock"
MOST_RUNS = 1000
"""Runs that MLflow gives at once."""
_warned = False


def tracking_uri() -> str:
    """The store: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def is_off(variable: str) -> bool:
    """Whether an environment variable, such as NRCG_TRACKING, switches something off."""
    return os.environ.get(variable, "").lower() in ("off", "0", "false", "no")


@functools.cache
def connect(uri: str) -> Store:
    """The store of an address, one object per process."""
    return Store(uri)


def reachable(uri: str) -> Store:
    """The store of an address, once it has answered. Raises NrcgError, one line."""
    try:
        store = connect(uri)
        store.client.search_experiments(max_results=1)
        return store
    except Exception as error:
        raise NrcgError(
            f"MLflow at {without_password(uri)} cannot be reached ({one_line(error)}); what is not sent is kept, "
            f"{_remedy(uri, error)}"
        ) from error


class Store:
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
        with _locked():
            self.client = MlflowClient(uri)
        self._experiments: dict[str, str] = {}

    def experiment(self, name: str) -> str:
        """Id of an experiment, made or restored where need be. Where this process meets it for the first time, runs are
        marked KILLED whose process is gone: after kill -9 nobody else ends them."""
        if name not in self._experiments:
            with _locked():
                experiment_id = self._get_or_create(name)
            query = f"attributes.status = 'RUNNING' and tags.`nrcg.host` = {quoted(socket.gethostname())}"
            for other in self.search([experiment_id], query):
                if not is_alive(other.data.tags):
                    self.client.set_terminated(other.info.run_id, "KILLED")
            self._experiments[name] = experiment_id
        return self._experiments[name]

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

    def search(self, experiment_ids: Sequence[str], query: str) -> list[StoredRun]:
        """All runs that MLflow's filter lets through, the newest first."""
        found, token = [], None
        while True:
            page = self.client.search_runs(list(experiment_ids), query, max_results=MOST_RUNS, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def find(self, experiment_id: str, uid: str) -> str:
        """Id of the run of a journal, "" where there is none."""
        found = self.search([experiment_id], f"tags.`nrcg.uid` = '{uid}'")
        return found[0].info.run_id if found else ""

    def invocation(self, experiment_id: str, invocation: str) -> str:
        """Id of the parent run of an invocation's jobs, made where need be."""
        with _locked():
            found = self.invocations([experiment_id], invocation)
            if found:
                return found[0].info.run_id
            started = begun(invocation)
            return self.client.create_run(
                experiment_id,
                start_time=int(started * 1000),
                run_name=time.strftime("snakemake %Y-%m-%d %H:%M:%S", time.localtime(started)),
                tags=invocation_tags(invocation),
            ).info.run_id

    def invocations(self, experiment_ids: Sequence[str], invocation: str) -> list[StoredRun]:
        """The parent runs of an invocation, one per experiment."""
        query = f"tags.`nrcg.invocation` = {quoted(invocation)} and tags.`nrcg.kind` = '{KIND_INVOCATION}'"
        return self.search(experiment_ids, query)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold an exclusive lock: on a fresh database, processes that start at once die in the schema migration,
    and two that create the same experiment at once log to the wrong one."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turn a failure of the store into one line on stderr per process. Nothing of MLflow may stop a job, so this
    catches every Exception; Ctrl-C goes through."""
    global _warned
    try:
        yield
    except Exception as error:
        if _warned:
            return
        _warned = True
        where = "mlflow.db" if uri.startswith("sqlite:") else without_password(uri)
        print(
            f"nrcg: warning: tracking by MLflow at {where} fails, the job goes on; what it logs is kept, "
            f"{_remedy(uri, error)} ({one_line(error)})",
            file=sys.stderr,
            flush=True,
        )


def _remedy(uri: str, error: BaseException) -> str:
    """How to send what a failed store did not take."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and any(words in str(error) for words in ("file is not a database", "image is malformed")):
        return f"move {Path(path).name}, which is damaged, away, then: nrcg track --sync"
    return "send it later by: nrcg track --sync"


def quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def one_line(error: BaseException) -> str:
    """An error's kind and first line."""
    return without_password(f"{type(error).__name__}: {error}".splitlines()[0][:300])


def without_password(text: str) -> str:
    """An address, or a text that holds some, to be shown or kept."""
    return re.sub(r"//[^/@\s]*@", "//", text)
