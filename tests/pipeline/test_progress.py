"""What a person sees of a run: jobs' own progress, events as the logger plugin writes them, and a real Snakemake."""

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
from nrcg.pipeline import progress, watch
from nrcg.pipeline.progress import JobState, Progress, read_states

SNAKEMAKE = str(Path(sys.executable).parent / "snakemake")
INFO = {"event": "run_info", "stats": {"all": 1, "sample": 4, "train_ddpm": 1, "total": 6}}
STARTED = {"event": "job_info", "jobid": 5, "rule_name": "train_ddpm"}
FINISHED = {"event": "job_finished", "job_id": 5}
SAYS = "import json, os, sys\ndef say(e): print(json.dumps(e), file=open(os.environ['NRCG_EVENTS'], 'a'))\n"


def failed(*logs: str) -> dict:
    return {"event": "job_error", "jobid": 5, "rule_name": "train_ddpm", "log": logs}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def says(*events: dict, then: str = "") -> list[str]:
    """A command that logs events as Snakemake's plugin does, and then does something else."""
    return [sys.executable, "-c", SAYS + "".join(f"say({event!r})\n" for event in events) + then]


def shown(command: list[str], status: int = 0, out: io.StringIO | None = None) -> str:
    """What a person sees of a command that ends with a status."""
    out = out or io.StringIO()
    assert watch.watch(command, Path("run.log"), weights={}, stream=out, line_seconds=0.0) == status
    assert not any(Path(".nrcg/progress").iterdir())
    return out.getvalue()


@pytest.fixture(autouse=True)
def progress_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "WRITE_SECONDS", 0.0)
    monkeypatch.setenv("NRCG_PROGRESS_DIR", str(tmp_path / "states"))
    return tmp_path / "states"


# --- A job ----------------------------------------------------------------------------------------------------------


def test_a_job_writes_where_it_is_and_removes_the_file(progress_dir):
    with Progress("train_ddpm", 10, "step") as job:
        job.resume(2)
        job.update(3)
        (state,) = read_states(progress_dir)
        assert (state.label, state.done, state.total, state.initial, state.pid) == ("train_ddpm", 5, 10, 2, os.getpid())
        assert state.share == 0.5 and state.started <= state.updated
    assert list(progress_dir.iterdir()) == []


def test_the_file_is_not_written_at_each_update_and_the_innermost_job_is_shown(progress_dir, monkeypatch):
    with Progress("outer", 2, "part") as outer:
        with Progress("inner", 2, "step"):
            outer.update()
            assert read_states(progress_dir)[0].label == "inner"
        monkeypatch.setattr(progress, "WRITE_SECONDS", 3600.0)
        for _ in range(50):
            outer.update()
        (state,) = read_states(progress_dir)
        assert (state.label, state.done) == ("outer", 2)


def test_a_job_whose_progress_cannot_be_written_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NRCG_PROGRESS_DIR", str(tmp_path / "file" / "below"))
    with Progress("job", 1, "step") as job:
        job.update()


@pytest.mark.parametrize(("seconds", "said"), [(60.0, []), (0.0, ["job 0 % [0/4 step]", "job 25 % [1/4 step]"])])
def test_off_a_terminal_a_line_is_due_now_and_then(capsys, monkeypatch, seconds, said):
    monkeypatch.setattr(progress, "PRINT_SECONDS", seconds)
    with Progress("job", 4, "step") as job:
        job.update()
    assert capsys.readouterr().err.splitlines() == said


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("job", 4, "step") as job:
        job.update(4)
    assert "job: 100%" in sys.stderr.getvalue()


def test_pictures_of_jobs_are_shown_once():
    draws = "from pathlib import Path; from nrcg.pipeline.progress import show_picture; import time\n"
    draws += "show_picture(Path('a b/epoch0002.png'), 'Samples'); time.sleep(0.5)"
    assert shown([sys.executable, "-c", draws]).count("Samples: a b/epoch0002.png\n") == 1
    assert "Samples: a b/epoch0002.png\n" in Path("run.log").read_text()  # the job's own stderr


def test_jobs_of_dead_processes_are_left_out(progress_dir):
    progress_dir.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for host, label in ((progress.socket.gethostname(), "killed"), ("other_host", "far away")):
        state = JobState(label, 1, 2, "step", dead.pid, 0.0, 1.0)
        (progress_dir / f"{host}-{dead.pid}.json").write_text(json.dumps(vars(state)))
    assert [found.label for found in read_states(progress_dir)] == ["far away"]


def test_no_estimate_before_there_is_ground_for_one():
    now = time.time()
    assert JobState("job", 50, 100, "step", 1, now - 1, now).seconds_left is None  # too early
    assert JobState("job", 50, 100, "step", 1, now - 60, now, initial=50).seconds_left is None  # nothing done here
    # 10 left, and 40 since the checkpoint took 80 s; tolerance: the clock goes on while this runs
    job = JobState("job", 90, 100, "step", 1, now - 80, now, initial=50)
    assert job.seconds_left == pytest.approx(20, abs=2)
    assert str(job).startswith("job 90 % (about 00:")


# --- A run ----------------------------------------------------------------------------------------------------------


def test_the_share_of_the_work_counts_costs_and_jobs_under_way():
    run, weights = watch.Run(), {"train_ddpm": 11, "sample": 2, "all": 1}  # 20 in all
    assert run.share(weights, []) == 0
    for event in (INFO, STARTED, FINISHED):
        run.take(event)
    half = JobState("sample robust scale 10", 5, 10, "image", 1, 0, 1)
    assert run.share(weights, [half]) == pytest.approx((11 + 1) / 20)


def test_a_real_snakemake_is_followed(tmp_path, monkeypatch, capfd):
    """Its events come through the plugin; on a dumb terminal, as through a pipe, there are lines and no escapes."""
    Path("Snakefile").write_text(
        "rule all:\n    input: 'a', 'b'\n"
        "rule good:\n    output: 'a'\n    shell: 'sleep 1; touch a'\n"
        "rule bad:\n    output: 'b'\n    log: 'logs/b.log'\n    shell: 'echo nrcg: x: cut off > {log}; exit 1'\n"
    )
    monkeypatch.setenv("TERM", "dumb")
    command = [SNAKEMAKE, "--cores", "1", "--keep-going", "--logger", watch.PLUGIN]
    lines = shown(command, 1, Terminal()).splitlines()
    assert "Rule bad failed." in lines and "  The end of logs/b.log:" in lines and "  nrcg: x: cut off" in lines
    assert any(line.endswith("0/3 jobs | good") for line in lines)
    assert lines[-1].endswith("failed with status 1 after 1 of 3 jobs. Log: run.log")
    assert "\x1b" not in "".join(lines) and "Finished jobid" in Path("run.log").read_text()
    assert capfd.readouterr() == ("", "")
    assert "nothing to be done. Log: run.log" in shown(says())


def test_a_run_that_succeeds_keeps_a_log_and_shows_its_jobs():
    """Those that say where they are, which need the folder that the run gives them."""
    then = (
        "import nrcg.pipeline.progress as p, time\n"
        "p.WRITE_SECONDS = 0\n"
        "with p.Progress('sample robust scale 10', 4, 'image') as job:\n"
        "    job.update()\n"
        "    print('text', flush=True)\n"
        "    time.sleep(1)\n"
    )
    out = shown(says(INFO, STARTED, FINISHED, then=then))
    assert "1/6 jobs | sample robust scale 10 25 %" in out and "1 jobs done. Log: run.log" in out
    assert Path("run.log").read_text() == "text\n"


def test_a_terminal_gets_bars_that_are_redrawn():
    out = shown(says(INFO, STARTED, FINISHED, then="import time; time.sleep(1)"), out=Terminal())
    assert "1/6 jobs" in out and "━" in out and "\x1b[2K" in out


def test_a_failed_job_shows_its_own_error(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i}\n" for i in range(40)) + "nrcg: warning: nothing\nnrcg: data/x: cut off\nend\n")
    lines = shown(says(INFO, STARTED, failed(str(log)), then="sys.exit(1)"), 1).splitlines()
    assert "  nrcg: data/x: cut off" in lines
    assert "  | line 39" in lines and "  | line 5" not in lines


@pytest.mark.parametrize("events", [(), (INFO, failed("missing.log"))])
def test_without_a_jobs_log_the_end_of_the_whole_log_is_shown(events):
    command = says(*events, then="print('KeyError in file Snakefile'); exit(2)")
    assert "  | KeyError in file Snakefile" in shown(command, 2)


def test_a_command_that_cannot_be_started_or_is_ended_by_a_signal():
    with pytest.raises(NrcgError, match="no-such-command: cannot be started"):
        shown(["no-such-command"])
    shown(says(then="import signal; os.kill(os.getpid(), signal.SIGKILL)"), 128 + signal.SIGKILL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 7)])
def test_ctrl_c_and_sigterm_are_passed_on(monkeypatch, number, status):
    monkeypatch.setattr(watch, "_terminal_reaches_child", lambda: False)
    code = (
        "import signal, sys, time\n"
        "def end(*_): print('cleaned up', flush=True); sys.exit(7)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )

    def press() -> None:
        while not (Path("run.log").exists() and "ready" in Path("run.log").read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=press, daemon=True).start()
    said = shown([sys.executable, "-c", code], status)
    assert "cleaned up" in Path("run.log").read_text()
    assert ("stopped" in said) == (status == 130)
