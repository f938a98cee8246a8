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
from typing import ClassVar

from tqdm import tqdm

from nrcg.files import atomic_write_text

WRITE_SECONDS = 0.5
PRINT_SECONDS = 60.0
MIN_SECONDS = 5.0
"""No estimate before a job has run for so long."""


@dataclass
class JobState:
    """What a job last said of itself: done units of the total, `initial` of them done by a former process; times in
    seconds since the epoch. The label's first word is the rule's name."""

    label: str
    done: int
    total: int
    unit: str
    pid: int
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
        if seconds < MIN_SECONDS or self.done <= self.initial:
            return None
        left = seconds / (self.done - self.initial) * (self.total - self.done)
        return max(left - (time.time() - self.updated), 0.0)

    def __str__(self) -> str:
        left = self.seconds_left
        about = "" if left is None else f" (about {tqdm.format_interval(left)} left)"
        return f"{self.label} {100 * self.share:.0f} %{about}"


class Progress:
    """How far a job is. On a terminal a tqdm bar, else a line a minute; and a file for `watch`.

    Of several in one process the one opened last is shown to `watch`.

    Args:
        label: what runs; its first word is the rule's name, such as "sample robust scale 10".
        total: number of units that make it whole.
        unit: what is counted, such as "step".
    """

    _open: ClassVar[list[Progress]] = []

    def __init__(self, label: str, total: int, unit: str) -> None:
        now = time.time()
        self.state = JobState(label, 0, total, unit, os.getpid(), now, now)

    def __enter__(self) -> Progress:
        self._next = time.monotonic()
        self._next_line = self._next + PRINT_SECONDS
        folder = os.environ.get("NRCG_PROGRESS_DIR")
        self._file = Path(folder) / f"{socket.gethostname()}-{os.getpid()}.json" if folder else None
        state = self.state
        self._bar = tqdm(desc=state.label, total=state.total, unit=state.unit) if sys.stderr.isatty() else None
        self._open.append(self)
        self.update(0)
        return self

    def update(self, n: int = 1) -> None:
        """n more units are done."""
        self.state.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if now < self._next or self._open[-1] is not self:
            return
        self._next, self.state.updated = now + WRITE_SECONDS, time.time()
        if self._file is not None:
            # A full disk or a folder that went away must not stop the job.
            with contextlib.suppress(OSError):
                atomic_write_text(self._file, json.dumps(vars(self.state)))
        if self._bar is None and now >= self._next_line:
            self._next_line = now + PRINT_SECONDS
            print(f"{self.state} [{self.state.done}/{self.state.total} {self.state.unit}]", file=sys.stderr, flush=True)

    def set(self, done: int) -> None:
        """`done` units are done in all."""
        self.update(done - self.state.done)

    def resume(self, done: int) -> None:
        """`done` units were done by a former process: they do not count for the estimate of what is left."""
        self.state.initial = done
        self.set(done)

    def __exit__(self, *error: object) -> None:
        self._open.remove(self)
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)


def show_picture(path: Path, caption: str) -> None:
    """A picture is there while its job goes on: said in the job's log, and by `nrcg run`."""
    print(f"{caption}: {path}", file=sys.stderr, flush=True)
    if events := os.environ.get("NRCG_EVENTS"):
        with contextlib.suppress(OSError), open(events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": "picture", "path": str(path), "caption": caption}) + "\n")


def read_states(folder: Path) -> list[JobState]:
    """States of the jobs that are alive, the longest running first."""
    states = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # its job has just ended
            state = JobState(**json.loads(path.read_text()))
            if path.name.startswith(f"{socket.gethostname()}-"):
                os.kill(state.pid, 0)  # a process that was killed leaves its file
            states.append(state)
    return sorted(states, key=lambda state: state.started)
