"""Experiment tracking: the only module that knows MLflow.

Every job is one run, below the run of the Snakemake invocation that started it. The store is
`sqlite:///<working directory>/mlflow.db` unless MLFLOW_TRACKING_URI names another; NRCG_TRACKING=off switches tracking
off. A job never fails because of its tracking: what it logs is journalled (nrcg/journal.py) before it is sent, and
where the store is down the job warns once and goes on. `sync` sends what is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nrcg import __version__
from nrcg.config import fingerprint
from nrcg.provenance import git_branch, git_commit
from nrcg.tracking.journal import Journal
from nrcg.tracking.models import _weights_sha256
from nrcg.tracking.store import (
    INVOCATION_ENDING,
    JOURNALS,
    MAX_PARAM,
    MAX_TAG,
    _clean_key,
    _connect,
    _cut,
    _is_off,
    _now,
    _process_start,
    _reported,
    _send,
    tracking_uri,
)

STEPS_PER_SCALE = 1000
"""MLflow's steps are whole numbers and guidance scales are not: step 50 is scale 0.05."""
FLUSH_SECONDS = 10.0
RETRY_SECONDS = 60.0
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
