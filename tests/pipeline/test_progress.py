"""What a person sees of a run, from fake commands that print what Snakemake prints."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nrcg.errors import NrcgError
from nrcg.pipeline import progress
from nrcg.pipeline.progress import JobState, Progress, Workflow, clock, read_states, watch

STATS = """\
Building DAG of jobs...
Job stats:
job           count
----------  -------
all               1
sample            4
train_ddpm        1
total             6

Select jobs to execute...
"""
STARTED = """\
[Sat Nov 21 12:02:47 2026]
localrule train_ddpm:
    output: models/x
    jobid: 5
    reason: Missing output files: models/x
"""
FINISHED = """\
[Sat Nov 21 12:02:55 2026]
Finished jobid: 5 (Rule: train_ddpm)
1 of 6 steps (17%) done
"""
FAILED = """\
[Sat Nov 21 12:02:55 2026]
Error in rule train_ddpm:
    message: None
    jobid: 5
    output: models/x
    log: {log} (check log file(s) for error details)
    shell:
        python job.py
        (command exited with non-zero exit code)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read(*texts: str) -> Workflow:
    workflow = Workflow()
    for line in "".join(texts).splitlines(keepends=True):
        workflow.read(line)
    return workflow


def prints(text: str, status: int = 0) -> list[str]:
    """A command that prints a text and exits."""
    return [sys.executable, "-c", f"import sys; print({text!r}, end=''); sys.exit({status})"]


@pytest.fixture
def progress_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "states"
    monkeypatch.setenv("NRCG_PROGRESS_DIR", str(folder))
    return folder


def state_files(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def test_a_job_writes_where_it_is_and_removes_the_file(progress_dir, monkeypatch):
    monkeypatch.setattr(progress, "WRITE_SECONDS", 0.0)
    with Progress("train_ddpm", 10, "step", initial=2) as job:
        job.update(3)
        (state,) = state_files(progress_dir)
        assert (state["label"], state["done"], state["total"], state["unit"]) == ("train_ddpm", 5, 10, "step")
        assert state["pid"] == os.getpid() and state["initial"] == 2 and state["started"] <= state["updated"]
        assert [found.done for found in read_states(progress_dir)] == [5]
    assert list(progress_dir.iterdir()) == []


def test_the_file_is_not_written_at_each_update(progress_dir, monkeypatch):
    monkeypatch.setattr(progress, "WRITE_SECONDS", 3600.0)
    with Progress("job", 100, "step") as job:
        for _ in range(50):
            job.update()
        assert job.done == 50
        assert state_files(progress_dir)[0]["done"] == 0


def test_the_innermost_progress_is_shown(progress_dir, monkeypatch):
    monkeypatch.setattr(progress, "WRITE_SECONDS", 0.0)
    with Progress("outer", 2, "part") as outer:
        with Progress("inner", 2, "step"):
            outer.update()
            assert state_files(progress_dir)[0]["label"] == "inner"
        outer.update()
        assert state_files(progress_dir)[0]["label"] == "outer"


def test_a_job_whose_progress_cannot_be_written_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NRCG_PROGRESS_DIR", str(tmp_path / "file" / "below"))
    with Progress("job", 1, "step") as job:
        job.update()
    assert job.done == 1


def test_off_a_terminal_nothing_is_printed_in_the_first_minute(capsys, monkeypatch):
    monkeypatch.delenv("NRCG_PROGRESS_DIR", raising=False)
    with Progress("job", 3, "step") as job:
        job.update()
    assert capsys.readouterr().err == ""


def test_off_a_terminal_a_line_is_due_now_and_then(capsys, monkeypatch):
    monkeypatch.delenv("NRCG_PROGRESS_DIR", raising=False)
    monkeypatch.setattr(progress, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "PRINT_SECONDS", 0.0)
    with Progress("job", 4, "step") as job:
        job.update()
    assert capsys.readouterr().err.splitlines()[-1] == "job 25 % [1/4 step]"


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("job", 4, "step") as job:
        job.update(4)
    assert "job: 100%" in sys.stderr.getvalue()


def test_negative_totals_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Progress("job", -1, "step")


def test_damaged_files_and_dead_processes_are_left_out(progress_dir):
    progress_dir.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    state = {"label": "job", "done": 1, "total": 2, "unit": "step", "started": 0.0, "updated": 1.0, "pid": dead.pid}
    (progress_dir / "damaged.json").write_text("{")
    (progress_dir / f"{progress.socket.gethostname()}-{dead.pid}.json").write_text(json.dumps(state))
    (progress_dir / "other_host-1.json").write_text(json.dumps(state | {"label": "far away"}))
    assert [found.label for found in read_states(progress_dir)] == ["far away"]


def test_no_estimate_before_there_is_ground_for_one():
    now = time.time()
    assert JobState("job", 50, 100, "step", now - 1, now).seconds_left is None  # too early
    assert JobState("job", 50, 100, "step", now - 60, now, initial=50).seconds_left is None  # nothing done here
    # 40 of the 50 left from the checkpoint took 80 s; tolerance: the clock goes on while this runs
    assert JobState("job", 90, 100, "step", now - 80, now, initial=50).seconds_left == pytest.approx(20, abs=2)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (170.4, "2:50"), (59.9, "1:00"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_snakemakes_output_is_understood():
    workflow = read(STATS, STARTED)
    assert workflow.total == 6 and workflow.done == 0
    assert workflow.planned == {"all": 1, "sample": 4, "train_ddpm": 1}
    assert workflow.running == {5: "train_ddpm"}
    workflow = read(STATS, STARTED, FINISHED)
    assert (workflow.done, workflow.total, workflow.running) == (1, 6, {})
    assert read("Nothing to be done (all requested files are present and up to date).\n").nothing_to_do


def test_a_failure_names_rule_and_logs():
    workflow = read(STATS, STARTED, FAILED.format(log="a.log, b.log"))
    assert [(failure.rule, failure.logs) for failure in workflow.failures] == [("train_ddpm", ["a.log", "b.log"])]
    assert workflow.running == {}


def test_the_share_of_the_work_counts_costs_and_jobs_under_way():
    workflow = read(STATS, STARTED, FINISHED)
    half = JobState("sample robust scale 10", 5, 10, "image", 0, 1)
    weights = {"train_ddpm": 11, "sample": 2, "all": 1}  # 20 in all
    assert workflow.share(weights, [half]) == pytest.approx((11 + 1) / 20)
    assert Workflow().share(weights, []) == 0


def test_a_run_that_succeeds_shows_lines_and_keeps_a_log(progress_dir):
    out = io.StringIO()
    text = STATS + STARTED + FINISHED
    assert watch(prints(text), Path("logs/run.log"), stream=out, line_seconds=0.0) == 0
    assert Path("logs/run.log").read_text() == text
    assert "1 jobs done. Log: logs/run.log" in out.getvalue()
    assert not any(Path(".nrcg/progress").iterdir())


def test_the_jobs_folder_reaches_the_command_and_running_jobs_are_shown(progress_dir):
    out = io.StringIO()
    code = (
        "import nrcg.progress as p, time\n"
        f"print({STATS!r}, flush=True)\n"
        "with p.Progress('sample robust scale 10', 4, 'image') as job:\n"
        "    job.update()\n"
        "    job._show(0)\n"
        "    time.sleep(1.5)\n"
    )
    assert watch([sys.executable, "-c", code], Path("run.log"), stream=out, line_seconds=0.0) == 0
    assert "0/6 jobs | sample robust scale 10 25 %" in out.getvalue()


def test_a_terminal_gets_bars_that_are_redrawn(progress_dir):
    out = Terminal()
    code = f"import time; print({STATS + STARTED + FINISHED!r}, flush=True); time.sleep(0.8)"
    assert watch([sys.executable, "-c", code], Path("run.log"), stream=out) == 0
    assert "[####....................] 1/6 jobs" in out.getvalue()
    assert "\x1b[1A" in out.getvalue()


def test_a_failed_job_shows_its_own_error(progress_dir, tmp_path):
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i}\n" for i in range(40)) + "nrcg: warning: nothing\nnrcg: data/x: cut off\nend\n")
    out = io.StringIO()
    assert watch(prints(STATS + STARTED + FAILED.format(log=log), 1), Path("run.log"), stream=out) == 1
    shown = out.getvalue().splitlines()
    assert "  nrcg: data/x: cut off" in shown
    assert "  | line 39" in shown and "  | line 5" not in shown
    assert shown[-1].endswith("failed with status 1 after 0 of 6 jobs. Log: run.log")


@pytest.mark.parametrize("text", ["KeyError in file Snakefile, line 3\n", STATS + FAILED.format(log="missing.log")])
def test_without_a_jobs_log_the_end_of_the_whole_log_is_shown(progress_dir, text):
    out = io.StringIO()
    assert watch(prints(text, 2), Path("run.log"), stream=out) == 2
    assert f"  | {text.splitlines()[-1]}" in out.getvalue()


def test_a_command_that_does_not_exist_is_one_line(progress_dir):
    with pytest.raises(NrcgError, match="no-such-command: cannot be started"):
        watch(["no-such-command"], Path("run.log"), stream=io.StringIO())


def test_a_command_ended_by_a_signal(progress_dir):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert watch(command, Path("run.log"), stream=io.StringIO()) == 128 + signal.SIGKILL


def test_ctrl_c_is_passed_on(progress_dir, monkeypatch):
    monkeypatch.setattr(progress, "_terminal_reaches_child", lambda: False)
    code = (
        "import time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('cleaned up')\n"
        "    raise SystemExit(1)\n"
    )

    def press_ctrl_c() -> None:
        while not (Path("run.log").exists() and "ready" in Path("run.log").read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    out = io.StringIO()
    assert watch([sys.executable, "-c", code], Path("run.log"), stream=out) == 130
    assert "cleaned up" in Path("run.log").read_text()
    assert "stopped" in out.getvalue()
