"""How far a job is: a bar or lines for a person, and a small file for `nrcg.pipeline.watch`.

Jobs write where they are into files of the folder NRCG_PROGRESS_DIR.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nrcg.files import atomic_write_text

if TYPE_CHECKING:
    from types import TracebackType


WRITE_SECONDS = 0.5
PRINT_SECONDS = 60.0
MIN_SECONDS = 5.0
"""No estimate before a job has run for so long."""


class Progress:
    """How far a job is. On a terminal a tqdm bar, else a line a minute; and a file for `watch`.

    Of several in one process the one opened last is shown to `watch`.

    Args:
        label: what runs; its first word is the rule's name, such as "sample robust scale 10".
        total: number of units that make it whole.
        unit: what is counted, such as "step".
        initial: units done before (a training that goes on from a checkpoint).

    Raises:
        ValueError: total or initial is negative.
    """

    _open: ClassVar[list[Progress]] = []

    def __init__(self, label: str, total: int, unit: str, initial: int = 0) -> None:
        if total < 0 or initial < 0:
            raise ValueError(f"total and initial must not be negative, got {total} and {initial}")
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.done = initial
        self._bar: Any = None
        self._file: Path | None = None

    def __enter__(self) -> Progress:
        self._started = time.time()
        now = time.monotonic()
        self._next = now
        self._next_line = now + PRINT_SECONDS
        if folder := os.environ.get("NRCG_PROGRESS_DIR"):
            self._file = Path(folder) / f"{socket.gethostname()}-{os.getpid()}.json"
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self.label, total=self.total, unit=self.unit, initial=self.initial)
        self._open.append(self)
        self._show(now)
        return self

    def update(self, n: int = 1) -> None:
        """n more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if now >= self._next:
            self._show(now)

    def resume(self, done: int) -> None:
        """`done` units were done by a former process: they do not count for the estimate of what is left."""
        self.initial = done
        self.set(done)

    def set(self, done: int) -> None:
        """`done` units are done in all."""
        self.update(done - self.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.remove(self)
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _show(self, now: float) -> None:
        self._next = now + WRITE_SECONDS
        if self._open[-1] is not self:
            return
        state = JobState(self.label, self.done, self.total, self.unit, self._started, time.time(), self.initial)
        if self._file is not None:
            # A full disk or a folder that went away must not stop the job.
            with contextlib.suppress(OSError):
                atomic_write_text(self._file, json.dumps(vars(state) | {"pid": os.getpid()}))
        if self._bar is None and now >= self._next_line:
            self._next_line = now + PRINT_SECONDS
            print(f"{state} [{self.done}/{self.total} {self.unit}]", file=sys.stderr, flush=True)


@dataclass
class JobState:
    """What a job last said of itself; times in seconds since the epoch."""

    label: str
    done: int
    total: int
    unit: str
    started: float
    updated: float
    initial: int = 0

    @property
    def share(self) -> float:
        """Done part, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None while that is not known."""
        seconds = self.updated - self.started
        if seconds < MIN_SECONDS or self.done <= self.initial or not self.total:
            return None
        left = seconds / (self.done - self.initial) * (self.total - self.done)
        return max(left - (time.time() - self.updated), 0.0)

    def __str__(self) -> str:
        left = self.seconds_left
        return f"{self.label} {100 * self.share:.0f} %" + (f" (about {clock(left)} left)" if left is not None else "")


def read_states(folder: Path) -> list[JobState]:
    """States of the jobs that are alive, the longest running first. Files that are damaged or whose process is gone
    are left out."""
    states = []
    for path in folder.glob("*.json"):
        try:
            values = json.loads(path.read_text())
            pid = values.pop("pid")
            if path.name.startswith(f"{socket.gethostname()}-"):
                os.kill(pid, 0)  # a process that was killed leaves its file
            states.append(JobState(**values))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(states, key=lambda state: state.started)


def clock(seconds: float) -> str:
    """Seconds as m:ss, from an hour on as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
