"""Progress that a person sees: a bar inside a job, and a live view of a whole Snakemake run.

Jobs write where they are into small files of the folder NRCG_PROGRESS_DIR; `watch` reads them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, TextIO

from nrcg.errors import NrcgError
from nrcg.files import atomic_write_text
from nrcg.processes import end_with_parent

if TYPE_CHECKING:
    from types import TracebackType


WRITE_SECONDS = 0.5
PRINT_SECONDS = 60.0
TAIL_LINES = 20
SHOWN_FAILURES = 3
MIN_SECONDS = 5.0
"""No estimate before a job has run for so long."""
MIN_SHARE = 0.05
"""No estimate of the whole run before this share of its work is done."""
BAR_WIDTH = 24


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


@dataclass
class Failure:
    """A job that failed, as Snakemake reports it."""

    rule: str
    logs: list[str] = field(default_factory=list)


class Workflow:
    """What Snakemake's output says of a run, read line by line."""

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self.nothing_to_do = False
        self.planned: Counter[str] = Counter()  # jobs per rule
        self.finished: Counter[str] = Counter()
        self.running: dict[int, str] = {}  # job id -> rule
        self.failures: list[Failure] = []
        self._rule = ""  # whose block the lines belong to
        self._in_error = False
        self._in_stats = False

    def read(self, line: str) -> None:
        """Take in one line of output."""
        line = line.rstrip()
        if self._in_stats:
            self._read_stats(line)
        elif line == "Job stats:":
            self._in_stats = True
            self.planned.clear()
        elif match := re.match(r"(\d+) of (\d+) steps \(.*\) done", line):
            self.done, self.total = int(match[1]), int(match[2])
        elif match := re.match(r"(?:local)?(?:rule|checkpoint) (\w+):", line):
            self._rule, self._in_error = match[1], False
        elif match := re.match(r"Error in rule (\w+):", line):
            self._rule, self._in_error = match[1], True
            self.failures.append(Failure(match[1]))
        elif match := re.match(r"Finished jobid: (\d+) \(Rule: (\w+)\)", line):
            self.running.pop(int(match[1]), None)
            self.finished[match[2]] += 1
        elif match := re.match(r" +jobid: (\d+)", line):
            if self._in_error:
                self.running.pop(int(match[1]), None)
            else:
                self.running[int(match[1])] = self._rule
        elif self._in_error and (match := re.match(r" +log: (.*?)(?: \(check log file.*)?$", line)):
            self.failures[-1].logs = match[1].split(", ")
        elif line.startswith("Nothing to be done"):
            self.nothing_to_do = True

    def _read_stats(self, line: str) -> None:
        match = re.match(r"(\w+) +(\d+)", line)
        if not line:
            self._in_stats = False
        elif match and match[1] == "total":
            self.total = int(match[2])
        elif match:
            self.planned[match[1]] = int(match[2])

    def share(self, weights: Mapping[str, float], states: Sequence[JobState]) -> float:
        """Done part of the work, 0 to 1, where a job of a rule costs `weights[rule]`, 1 if not given."""

        def cost(jobs: Mapping[str, float]) -> float:
            return sum(weights.get(rule, 1.0) * count for rule, count in jobs.items())

        under_way: Counter[str] = Counter()
        for state in states:
            under_way[state.label.split()[0] if state.label else ""] += state.share
        whole = cost(self.planned)
        return min((cost(self.finished) + cost(under_way)) / whole, 1.0) if whole else 0.0


def watch(
    command: Sequence[str],
    log: Path,
    *,
    weights: Mapping[str, float] | None = None,
    stream: TextIO | None = None,
    line_seconds: float = 15.0,
) -> int:
    """Run Snakemake and show how far it is.

    On a terminal: a bar for the run and one per job, redrawn in place. Elsewhere: a line every 15 seconds. The whole
    output goes to the log. If the run fails, the failed jobs' own errors are shown and where to read more.

    Args:
        command: what to run, as it is; it shares the process group, so that Ctrl-C reaches it too.
        log: file for its stdout and stderr; overwritten.
        weights: rule name to the relative cost of one of its jobs. Without it no time is estimated for the whole
            run: counting jobs would mislead where one takes as long as a hundred others.
        stream: where to show it; None: stderr.
        line_seconds: seconds between lines off a terminal.

    Returns:
        The command's exit status; 128 + N if signal N ended it, 130 after Ctrl-C.

    Raises:
        NrcgError: the command cannot be started.
    """
    stream = stream or sys.stderr
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not the system's temporary folder: jobs on a cluster's nodes share this one.
    folder = Path(".nrcg/progress").absolute() / f"{socket.gethostname()}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    view = _View(stream, log, weights, line_seconds)
    environment = os.environ | {"NRCG_PROGRESS_DIR": str(folder)}
    try:
        with log.open("wb") as file:
            try:
                child = subprocess.Popen(
                    list(command),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    preexec_fn=functools.partial(end_with_parent, os.getpid()),
                )
            except OSError as error:
                raise NrcgError(f"{command[0]}: cannot be started: {error.strerror or error}") from None
            reader = threading.Thread(target=_tee, args=(child.stdout, file, view.workflow), daemon=True)
            reader.start()
            interrupted = _wait(child, view, folder)
            # A job that outlives Snakemake holds the pipe open: do not wait for it.
            reader.join(timeout=2.0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = 130 if interrupted else child.returncode if child.returncode >= 0 else 128 - child.returncode
    view.finish(status)
    return status


def _tee(source: IO[bytes], file: IO[bytes], workflow: Workflow) -> None:
    for line in source:
        with contextlib.suppress(OSError, ValueError):  # a full disk; or the log is closed already
            file.write(line)
            file.flush()
        workflow.read(line.decode("utf-8", errors="replace"))


def _wait(child: subprocess.Popen, view: _View, folder: Path) -> bool:
    """Show the progress until the child ends; whether Ctrl-C was pressed."""
    interrupts = 0
    with _passing_on_sigterm(child):
        while child.poll() is None:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.25)
                view.show(read_states(folder))
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 1:
                    view.say("Stopping (once more: at once) ...")
                # A terminal sends Ctrl-C to the whole group; a second one would cut short Snakemake's clean-up.
                if interrupts > 1:
                    child.terminate() if interrupts == 2 else child.kill()
                elif not _terminal_reaches_child():
                    child.send_signal(signal.SIGINT)
    return interrupts > 0


@contextlib.contextmanager
def _passing_on_sigterm(child: subprocess.Popen) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there Python sets handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminal_reaches_child() -> bool:
    """Whether this process group is a terminal's foreground, where Ctrl-C goes to every member."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


class _View:
    """Draws the state of a run on a terminal or as lines."""

    def __init__(self, stream: TextIO, log: Path, weights: Mapping[str, float] | None, line_seconds: float) -> None:
        self.workflow = Workflow()
        self._stream, self._log, self._weights, self._line_seconds = stream, log, weights, line_seconds
        self._terminal = stream.isatty()
        self._started = time.monotonic()
        self._next_line = self._started + line_seconds
        self._drawn = 0  # lines of the last drawing
        self._reported = 0  # failures told

    def show(self, states: Sequence[JobState]) -> None:
        """Redraw, or print a line if it is time to."""
        for failure in self.workflow.failures[self._reported :]:
            self.say(f"Rule {failure.rule} failed.")
            self._reported += 1
        if self._terminal:
            self._draw(states)
        elif time.monotonic() >= self._next_line:
            self._next_line += self._line_seconds
            self._print(f"[{self._elapsed():>5}] " + " | ".join([self._overall(states), *self._jobs(states)]))

    def say(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        self._print(text)

    def finish(self, status: int) -> None:
        """The last words: what was done, or what failed and where to read on."""
        self._erase()
        flow = self.workflow
        if status == 0:
            jobs = "nothing to be done" if flow.nothing_to_do else f"{flow.done} jobs done"
            self._print(f"[{self._elapsed():>5}] {jobs}. Log: {self._log}")
            return
        for failure in flow.failures[:SHOWN_FAILURES]:
            self._explain(failure)
        if len(flow.failures) > SHOWN_FAILURES:
            self._print(f"\n... and {len(flow.failures) - SHOWN_FAILURES} more failed jobs")
        if not flow.failures and status != 130:
            self._quote(self._log)
        ended = "stopped" if status == 130 else f"failed with status {status}"
        self._print(f"[{self._elapsed():>5}] {ended} after {flow.done} of {flow.total or '?'} jobs. Log: {self._log}")

    def _explain(self, failure: Failure) -> None:
        self._print(f"\nIn rule {failure.rule}:")
        shown = False
        for name in failure.logs:
            shown |= self._quote(Path(name))
        if not shown:
            self._quote(self._log)

    def _quote(self, path: Path) -> bool:
        """A log's last lines, and above them the one that says what is wrong; False if there is nothing in it."""
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            return False
        if not any(line.strip() for line in lines):
            return False
        errors = [line for line in lines if line.startswith("nrcg: ") and not line.startswith("nrcg: warning")]
        if errors:
            self._print(f"\n  {self._strong(errors[-1])}\n")
        self._print(f"  The end of {path}:")
        for line in lines[-TAIL_LINES:]:
            self._print(f"  | {line}")
        return True

    def _overall(self, states: Sequence[JobState]) -> str:
        flow = self.workflow
        if flow.total is None:
            return "planning the jobs"
        left = self._seconds_left(states)
        return f"{flow.done}/{flow.total} jobs" + (f" (about {clock(left)} left)" if left is not None else "")

    def _seconds_left(self, states: Sequence[JobState]) -> float | None:
        if not self._weights:
            return None
        share = self.workflow.share(self._weights, states)
        seconds = time.monotonic() - self._started
        return seconds * (1 - share) / share if share >= MIN_SHARE and seconds >= MIN_SECONDS else None

    def _jobs(self, states: Sequence[JobState]) -> list[str]:
        """A text per running job: those that report, else the rules' names."""
        if states:
            return [str(state) for state in states]
        names = Counter(list(self.workflow.running.values()))
        return [f"{count} x {name}" if count > 1 else name for name, count in names.items()]

    def _draw(self, states: Sequence[JobState]) -> None:
        width, height = shutil.get_terminal_size()
        flow = self.workflow
        share = flow.share(self._weights, states) if self._weights else flow.done / (flow.total or 1)
        rows = [f"[{self._elapsed():>5}] {_bar(share)} {self._overall(states)}"]
        shares = [state.share for state in states]
        for position, text in enumerate(self._jobs(states)):
            rows.append(f"        {_bar(shares[position]) if states else ' ' * (BAR_WIDTH + 2)} {text}")
        room = max(height - 2, 1)
        if len(rows) > room:
            rows[room - 1 :] = [f"        and {len(rows) - room + 1} more jobs"]
        # A row that wraps would make the count of lines wrong.
        text = "".join(f"\x1b[2K{row[: width - 1]}\n" for row in rows)
        self._stream.write(f"{self._rewind()}{text}\x1b[J")
        self._stream.flush()
        self._drawn = len(rows)

    def _rewind(self) -> str:
        return f"\x1b[{self._drawn}A" if self._drawn else ""

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"{self._rewind()}\x1b[J")
            self._drawn = 0

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _strong(self, text: str) -> str:
        return f"\x1b[1;31m{text}\x1b[0m" if self._terminal else text

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._started)


def _bar(share: float) -> str:
    full = round(share * BAR_WIDTH)
    return f"[{'#' * full}{'.' * (BAR_WIDTH - full)}]"
