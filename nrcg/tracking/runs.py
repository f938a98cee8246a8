"""Runs: what a job logs while it is at work.

Every job is one run, below the run of the Snakemake invocation that started it. A job never fails because of its
tracking: what it logs is journalled before it is sent, and where the store is down the job warns once and goes on.
NRCG_TRACKING=off switches tracking off.
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
from nrcg.files import weights_sha256
from nrcg.provenance import git_branch, git_commit
from nrcg.tracking.invocations import process_start
from nrcg.tracking.journal import Journal
from nrcg.tracking.sending import INVOCATION_ENDING, JOURNALS, send
from nrcg.tracking.store import connect, is_off, reported, tracking_uri, without_password

STEPS_PER_SCALE = 1000
"""MLflow's steps are whole numbers and guidance scales are not: step 50 is scale 0.05."""
FLUSH_SECONDS = 10.0
RETRY_SECONDS = 60.0
_enclosing: list[str] = []
"""Journals of this process's open runs, the innermost last."""


class Run:
    """A run under way. Failures of the store are reported once and never raised.

    Args:
        journal: begun by its start; None: nothing is tracked.
        deferred: leave the sending to the end of the invocation.
    """

    def __init__(self, journal: Journal | None, *, deferred: bool = False) -> None:
        self._journal, self._deferred = journal, deferred
        self._uri = tracking_uri()
        self._infinite: set[str] = set()
        self._next_send = 0.0

    def __enter__(self) -> Run:
        if self._journal is not None:
            _enclosing.append(self._journal.uid)
            if not self._deferred:
                self._send()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._journal is None:
            return
        _enclosing.remove(self._journal.uid)
        tags = {} if error is None else {"nrcg.error": f"{type(error).__name__}: {error}"}
        if self._infinite:
            tags["nrcg.infinite_metrics"] = ", ".join(sorted(self._infinite))
        with reported(self._uri):
            self._journal.append("end", time=_now(), status=_status(error), tags=tags)
            if not self._deferred:
                send(self._journal, connect(self._uri))
                self._journal.remove()
        self._journal.close()

    @property
    def id(self) -> str:
        """MLflow's id of the run; before the store has answered, "pending-<value of the tag nrcg.uid>"; "" where
        nothing is tracked."""
        return "" if self._journal is None else self._journal.run_id or f"pending-{self._journal.uid}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers under their names; they are sent in pieces, every ten seconds at most.

        Infinite values are stored as NaN, and the tag nrcg.infinite_metrics names them: MLflow would store
        1.8e308, which flattens every chart.

        Args:
            metrics: name to number.
            step: position on the chart's axis; None counts as 0.
        """
        values = {_clean_key(name): float(number) for name, number in metrics.items()}
        infinite = {name: math.nan for name, value in values.items() if math.isinf(value)}
        self._infinite |= infinite.keys()
        self._log("metrics", values=values | infinite, step=int(step or 0))

    def log_artifact(self, path: str | os.PathLike, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, into a folder of them or to their top."""
        if self._journal is not None:
            with reported(self._uri):
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
        """Log a data set as an input of the run, in MLflow's sense: its folder, the SHA-256 of its images, their shape
        (N, H, W, C), the names of its classes, and what it is for, such as "training"."""
        about = {"name": name, "sha256": sha256, "shape": list(shape), "classes": list(classes), "context": context}
        self._log("dataset", path=os.fspath(Path(path).absolute()), **about)

    def log_model(self, path: str | os.PathLike, name: str) -> None:
        """Log a model in MLflow's sense: `mlflow.pytorch.load_model("models:/<id>")` opens it.

        It is exported as a graph (torch.export), so that whoever opens it runs no code from a file and needs no nrcg.
        A classifier takes images (B, C, H, W) in [-1, 1]; a U-Net takes x_t and t (B,) and gives its prediction.
        NRCG_LOG_MODELS=off leaves models out.

        Args:
            path: a folder as `nrcg train-ddpm` or `nrcg train-classifier` writes it.
            name: of the logged model.
        """
        if self._journal is not None and not is_off("NRCG_LOG_MODELS"):
            self._log("model", path=os.fspath(Path(path).absolute()), name=name, sha256=weights_sha256(path))

    def _log(self, op: str, **fields: Any) -> None:
        if self._journal is None:
            return
        with reported(self._uri):
            self._journal.append(op, time=_now(), **fields)
        if not self._deferred and time.monotonic() >= self._next_send:
            self._send()

    def _send(self) -> None:
        self._next_send = time.monotonic() + RETRY_SECONDS
        with reported(self._uri):
            send(self._journal, connect(self._uri))
            self._next_send = time.monotonic() + FLUSH_SECONDS


@contextlib.contextmanager
def run(
    experiment: str,
    name: str,
    *,
    kind: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    deferred: bool = False,
) -> Iterator[Run]:
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
        params: settings, nested as they like; logged flat with dots.
        tags: further tags, beside those that every run has (`_standard_tags`).
        deferred: send nothing now but at the end of the invocation, so that a short job need not load MLflow. Has no
            effect outside an invocation.

    Yields:
        The run, whose id is "" and which logs nothing where nothing is tracked.
    """
    active = Run(None)
    if not is_off("NRCG_TRACKING"):
        with reported(tracking_uri()):
            invocation = os.environ.get("NRCG_INVOCATION", "")
            if invocation:
                JOURNALS.mkdir(parents=True, exist_ok=True)
                (JOURNALS / f"{invocation}{INVOCATION_ENDING}").touch()
            journal = Journal.create(JOURNALS)
            flat = flatten(params)
            journal.append(
                "start",
                time=_now(),
                uri=without_password(tracking_uri()),  # none on disk
                experiment=experiment,
                name=name,
                params=flat,
                tags=_standard_tags(kind, flat) | {"nrcg.uid": journal.uid} | dict(tags or {}),
                parent=_enclosing[-1] if _enclosing else "",
                invocation=invocation,
            )
            active = Run(journal, deferred=deferred and bool(invocation))
    with active:
        yield active


def _standard_tags(kind: str, params: Mapping[str, str]) -> dict[str, str]:
    commit = git_commit()
    tags = {
        "nrcg.kind": kind,
        "nrcg.git_commit": commit,
        "nrcg.git_branch": git_branch(),
        "nrcg.config_hash": fingerprint(params),
        "nrcg.version": __version__,
        "nrcg.host": socket.gethostname(),
        "nrcg.pid": str(os.getpid()),
        "nrcg.process_started": process_start(os.getpid()),
        "mlflow.source.git.commit": commit,  # the column of MLflow's table
    }
    seeds = [value for key, value in params.items() if key == "seed" or key.endswith(".seed")]
    if "seed" in params or len(seeds) == 1:
        tags["nrcg.seed"] = params.get("seed", seeds[0])
    return tags


def _status(error: BaseException | None) -> str:
    code = error.code if isinstance(error, SystemExit) else error
    if code in (None, 0):
        return "FINISHED"
    return "KILLED" if code in (130, 143) or isinstance(error, KeyboardInterrupt) else "FAILED"


def log_method_over_scales(method_run: Run, rows: Iterable[Mapping[str, Any]], best: Mapping[str, float]) -> None:
    """Log a method's numbers over its guidance scales as one curve per metric.

    Texts in the rows are left out. Numbers at the best scale are logged as `best/<name>`: MLflow's tables show the
    last step of a curve, which is the highest scale.
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

    Lists become JSON; null, true and false are written as in YAML. Characters that MLflow refuses in a key become
    underscores.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        else:
            flat[_clean_key(path)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _clean_key(key: str) -> str:
    # MLflow takes a name as a path: no leading or trailing slash, no "..".
    return re.sub(r"[^\w. /:-]", "_", key).strip("/").replace("..", "_") or "_"


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)
