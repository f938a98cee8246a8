"""A live view of a whole Snakemake run, from the events that Snakemake logs and the files that its jobs write.

Snakemake's text goes to a log file as it is; its events come through a logger plugin (`snakemake_plugin/`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nrcg.errors import NrcgError
from nrcg.pipeline.progress import MIN_SECONDS, JobState, clock, read_states
from nrcg.processes import end_with_parent

PLUGIN = "nrcg"
"""Name of the logger plugin: `snakemake --logger nrcg`."""
POLL_SECONDS = 0.25
MIN_SHARE = 0.05
"""No estimate of the whole run before this share of its work is done."""
TAIL_LINES = 20
SHOWN_FAILURES = 3


@dataclass
class Run:
    """What Snakemake's events say of a run.

    Attributes:
        planned, finished: Number of jobs per rule.
        running: Rule of each job under way, by the job's number.
        failures: Rule and log files of each job that failed.
        done, total: Number of jobs; None before the jobs are planned.
    """

    planned: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    running: dict[int, str] = field(default_factory=dict)
    failures: list[tuple[str, list[str]]] = field(default_factory=list)
    done: int = 0
    total: int | None = None

    def take(self, entry: Mapping) -> None:
        """Take in one event, as the plugin writes it."""
        match entry["event"]:
            case "run_info" if self.total is None:
                self.planned = Counter({rule: count for rule, count in entry["stats"].items() if rule != "total"})
                self.total = sum(self.planned.values())
            case "job_info":
                self.running[entry["jobid"]] = entry["rule_name"]
            case "job_finished":
                if rule := self.running.pop(entry["job_id"], None):
                    self.finished[rule] += 1
            case "job_error":
                self.running.pop(entry["jobid"], None)
                self.failures.append((entry["rule_name"], [str(path).split(" (")[0] for path in entry["log"] or ()]))
            case "progress":
                self.done, self.total = entry["done"], entry["total"]

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
    weights: Mapping[str, float],
    stream: TextIO | None = None,
    line_seconds: float = 15.0,
) -> int:
    """Run Snakemake and show how far it is.

    On a terminal: a bar for the run and one per job, redrawn in place. Elsewhere: a line every 15 seconds. The whole
    output goes to the log. If the run fails, the failed jobs' own errors are shown and where to read more.

    Args:
        command: What to run, with `--logger nrcg`; it shares the process group, so that Ctrl-C reaches it too.
        log: File for its stdout and stderr; overwritten.
        weights: Rule name to the relative cost of one of its jobs.
        stream: Where to show it; None: stderr.
        line_seconds: Seconds between lines off a terminal.

    Returns:
        The command's exit status; 128 + N if signal N ended it, 130 after Ctrl-C.

    Raises:
        NrcgError: The command cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not the system's temporary folder: jobs on a cluster's nodes share this one.
    folder = Path(".nrcg/progress").absolute() / f"{socket.gethostname()}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    view = _View(
        Console(file=stream, stderr=stream is None, highlight=False, soft_wrap=True), log, weights, line_seconds
    )
    plugins = Path(__file__).parent / "snakemake_plugin"
    environment = os.environ | {
        "NRCG_PROGRESS_DIR": str(folder),
        "NRCG_EVENTS": str(folder / "events.jsonl"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(plugins), os.environ.get("PYTHONPATH")))),
    }
    try:
        with log.open("wb") as file:
            try:
                child = subprocess.Popen(
                    list(command),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    preexec_fn=functools.partial(end_with_parent, os.getpid()),
                )
            except OSError as error:
                raise NrcgError(f"{command[0]}: cannot be started: {error.strerror or error}") from None
            with view:
                interrupted = _wait(child, view, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = 130 if interrupted else child.returncode if child.returncode >= 0 else 128 - child.returncode
    view.finish(status)
    return status


def _wait(child: subprocess.Popen, view: _View, folder: Path) -> bool:
    """Show the progress until the child ends; whether Ctrl-C was pressed."""
    interrupts, offset = 0, 0
    with _passing_on_sigterm(child):
        ended = False
        while not ended:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL_SECONDS)
                ended = child.poll() is not None
                offset = _read_events(folder / "events.jsonl", offset, view.run)
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


def _read_events(path: Path, offset: int, run: Run) -> int:
    """Take in the whole lines behind a position; returns the position behind them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            text = file.read()
    except OSError:
        return offset
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        run.take(json.loads(line))
    return offset + len(whole)


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
    """Shows a run on a terminal by bars, elsewhere by lines."""

    def __init__(self, console: Console, log: Path, weights: Mapping[str, float], line_seconds: float) -> None:
        self.run = Run()
        self._console, self._log, self._weights, self._line_seconds = console, log, weights, line_seconds
        self._started = time.monotonic()
        self._next_line = self._started + line_seconds
        self._reported = 0  # failures told
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> _View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, states: Sequence[JobState]) -> None:
        """Redraw, or print a line if it is time to."""
        for rule, _ in self.run.failures[self._reported :]:
            self.say(f"Rule {rule} failed.")
            self._reported += 1
        if self._live is not None:
            self._live.update(self._bars(states), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line += self._line_seconds
            self.say(f"{self._elapsed()} " + " | ".join([self._overall(states), *self._jobs(states)]))

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(Text(text, style))

    def finish(self, status: int) -> None:
        """The last words: what was done, or what failed and where to read on."""
        run = self.run
        if status == 0:
            jobs = "nothing to be done" if run.total is None else f"{run.done} jobs done"
            self.say(f"{self._elapsed()} {jobs}. Log: {self._log}")
            return
        for rule, logs in run.failures[:SHOWN_FAILURES]:
            self.say(f"\nIn rule {rule}:")
            quoted = [self._quote(Path(log)) for log in logs]
            if not any(quoted):
                self._quote(self._log)
        if len(run.failures) > SHOWN_FAILURES:
            self.say(f"\n... and {len(run.failures) - SHOWN_FAILURES} more failed jobs")
        if not run.failures and status != 130:
            self._quote(self._log)
        ended = "stopped" if status == 130 else f"failed with status {status}"
        self.say(f"{self._elapsed()} {ended} after {run.done} of {run.total or '?'} jobs. Log: {self._log}")

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
            self.say(f"\n  {errors[-1]}\n", "bold red")
        self.say(f"  The end of {path}:")
        for line in lines[-TAIL_LINES:]:
            self.say(f"  | {line}")
        return True

    def _overall(self, states: Sequence[JobState]) -> str:
        if self.run.total is None:
            return "planning the jobs"
        share, seconds = self.run.share(self._weights, states), time.monotonic() - self._started
        known = share >= MIN_SHARE and seconds >= MIN_SECONDS
        left = f" (about {clock(seconds * (1 - share) / share)} left)" if known else ""
        return f"{self.run.done}/{self.run.total} jobs{left}"

    def _jobs(self, states: Sequence[JobState]) -> list[str]:
        """A text per running job: those that report, else the rules' names."""
        if states:
            return [str(state) for state in states]
        return [
            f"{count} x {name}" if count > 1 else name for name, count in Counter(self.run.running.values()).items()
        ]

    def _bars(self, states: Sequence[JobState]) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_row(
            self._elapsed(),
            ProgressBar(total=1.0, completed=self.run.share(self._weights, states), width=24),
            self._overall(states),
        )
        room = max(self._console.height - 3, 1)
        shares = [state.share for state in states]
        for position, text in enumerate(self._jobs(states)[:room]):
            bar = ProgressBar(total=1.0, completed=shares[position], width=24) if states else ""
            table.add_row("", bar, Text(text, no_wrap=True, overflow="ellipsis"))
        return Group(table)

    def _elapsed(self) -> str:
        return f"[{clock(time.monotonic() - self._started):>5}]"
