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
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from nrcg.errors import NrcgError
from nrcg.pipeline.progress import MIN_SECONDS, JobState, read_states
from nrcg.processes import end_with_parent

PLUGIN = "nrcg"
"""Name of the logger plugin: `snakemake --logger nrcg`."""
PLUGIN_FOLDER = Path(__file__).parent / "snakemake_plugin"
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
        pictures: Caption and path of what jobs under way have drawn.
    """

    planned: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    running: dict[int, str] = field(default_factory=dict)
    failures: list[tuple[str, list[str]]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)

    def take(self, entry: Mapping) -> None:
        """Take in one event, as the plugin writes it."""
        match entry["event"]:
            case "run_info":
                self.planned = Counter({rule: count for rule, count in entry["stats"].items() if rule != "total"})
            case "job_info":
                self.running[entry["jobid"]] = entry["rule_name"]
            case "job_finished":
                if rule := self.running.pop(entry["job_id"], ""):
                    self.finished[rule] += 1
            case "job_error":
                self.running.pop(entry["jobid"], None)
                self.failures.append((entry["rule_name"], entry["log"]))
            case "picture":
                self.pictures.append((entry["caption"], entry["path"]))

    def share(self, weights: Mapping[str, float], states: Sequence[JobState]) -> float:
        """Done part of the work, 0 to 1, where a job of a rule costs `weights[rule]`, 1 if not given."""
        done: dict[str, float] = Counter(self.finished)
        for state in states:
            done[state.label.partition(" ")[0]] += state.share
        cost, whole = (sum(weights.get(rule, 1.0) * jobs[rule] for rule in jobs) for jobs in (done, self.planned))
        return min(cost / whole, 1.0) if whole else 0.0


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
    view = _View(stream, log, folder, weights, line_seconds)
    environment = os.environ | {
        "NRCG_PROGRESS_DIR": str(folder),
        "NRCG_EVENTS": str(view.events),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PLUGIN_FOLDER), os.environ.get("PYTHONPATH")))),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        file = stack.enter_context(log.open("wb"))
        die_with_this = functools.partial(end_with_parent, os.getpid())
        try:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_this
            )
        except OSError as error:
            raise NrcgError(f"{command[0]}: cannot be started: {error.strerror or error}") from None
        status = _wait(child, view)
    view.finish(status)
    return status


def _wait(child: subprocess.Popen, view: _View) -> int:
    """Show the progress until the child ends; its exit status."""
    interrupts = 0
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    with view.live or contextlib.nullcontext():
        while True:
            try:
                ended = child.poll() is not None
                view.show()
                if ended:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL_SECONDS)
            except KeyboardInterrupt:
                interrupts += 1
                # A terminal sends Ctrl-C to the whole group; a second one would cut short Snakemake's clean-up.
                if interrupts > 1:
                    child.terminate() if interrupts == 2 else child.kill()
                    continue
                view.say("Stopping (once more: at once) ...")
                if not _terminal_reaches_child():
                    child.send_signal(signal.SIGINT)
    signal.signal(signal.SIGTERM, before)
    return 130 if interrupts else child.returncode if child.returncode >= 0 else 128 - child.returncode


def _terminal_reaches_child() -> bool:
    """Whether this process group is a terminal's foreground, where Ctrl-C goes to every member."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


class _View:
    """Shows a run on a terminal by bars, elsewhere, also on one that cannot move its cursor, by lines."""

    def __init__(
        self, stream: TextIO | None, log: Path, folder: Path, weights: Mapping[str, float], line_seconds: float
    ) -> None:
        self.run, self.events = Run(), folder / "events.jsonl"
        self._log, self._folder, self._weights, self._line_seconds = log, folder, weights, line_seconds
        self._console = Console(file=stream, stderr=stream is None, highlight=False, soft_wrap=True)
        redraws = self._console.is_terminal and not self._console.is_dumb_terminal
        self.live = Live(console=self._console, transient=True, auto_refresh=False) if redraws else None
        self._started = time.monotonic()
        self._next_line = self._started + line_seconds
        self._offset = 0  # in the events
        self.events.touch()

    def show(self) -> None:
        """Read what is new; redraw, or print a line if it is time to."""
        told, shown = len(self.run.failures), len(self.run.pictures)
        with self.events.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self.run.take(json.loads(line))
        for rule, _ in self.run.failures[told:]:
            self.say(f"Rule {rule} failed.")
        for caption, path in self.run.pictures[shown:]:
            self.say(f"{self._elapsed()} {caption}: {path}")
        states = read_states(self._folder)
        # Jobs that say where they are, else the names of those that run.
        running = Counter(self.run.running.values()).items()
        jobs = [str(state) for state in states] or [f"{n} x {rule}" if n > 1 else rule for rule, n in running]
        share = self.run.share(self._weights, states)
        if self.live is not None:
            self.live.update(self._bars(share, jobs, states), refresh=True)
        elif time.monotonic() >= self._next_line:
            self._next_line += self._line_seconds
            self.say(f"{self._elapsed()} " + " | ".join([self._overall(share), *jobs]))

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(Text(text, style))

    def finish(self, status: int) -> None:
        """The last words: what was done, or what failed and where to read on."""
        run, done = self.run, self.run.finished.total()
        if status == 0:
            jobs = f"{done} jobs done" if run.planned else "nothing to be done"
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
        self.say(f"{self._elapsed()} {ended} after {done} of {run.planned.total() or '?'} jobs. Log: {self._log}")

    def _quote(self, path: Path) -> bool:
        """A log's last lines, and above them the one that says what is wrong; False if there is nothing in it."""
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        if not any(line.strip() for line in lines):
            return False
        errors = [line for line in lines if line.startswith("nrcg: ") and not line.startswith("nrcg: warning")]
        if errors:
            self.say(f"\n  {errors[-1]}\n", "bold red")
        self.say(f"  The end of {path}:")
        for line in lines[-TAIL_LINES:]:
            self.say(f"  | {line}")
        return True

    def _overall(self, share: float) -> str:
        if not self.run.planned:
            return "planning the jobs"
        seconds = time.monotonic() - self._started
        known = share >= MIN_SHARE and seconds >= MIN_SECONDS
        left = f" (about {tqdm.format_interval(seconds * (1 - share) / share)} left)" if known else ""
        return f"{self.run.finished.total()}/{self.run.planned.total()} jobs{left}"

    def _bars(self, share: float, jobs: Sequence[str], states: Sequence[JobState]) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_row(self._elapsed(), ProgressBar(1.0, share, width=24), self._overall(share))
        for number, text in enumerate(jobs[: max(self._console.height - 3, 1)]):
            bar = ProgressBar(1.0, states[number].share, width=24) if states else ""
            table.add_row("", bar, Text(text, no_wrap=True, overflow="ellipsis"))
        return table

    def _elapsed(self) -> str:
        return f"[{tqdm.format_interval(time.monotonic() - self._started)}]"
