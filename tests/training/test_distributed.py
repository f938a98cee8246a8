"""Processes that train together: they start and end together, and share each batch."""

import os
import random
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from training_job import CLASSIFIER, CPU, DDPM, FORKS, Job, assert_almost_same_weights, wait_until

from nrcg.errors import ConfigError
from nrcg.training import distributed
from nrcg.training.distributed import Ranks, launch, num_processes


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """torchrun's agent leaves its handlers behind, in a process that is expected to end with it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def alive(pid: int) -> bool:
    try:
        # A process that ended but was not waited for is a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 64])
def test_the_processes_parts_are_the_whole_in_order(count, size):
    parts = []
    for rank in range(count):
        ranks = Ranks()
        ranks.rank, ranks.count = rank, count
        parts.append(list(range(size))[ranks.share(size)])
    assert [entry for part in parts for entry in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("asked", "device", "visible", "given", "expected"),
    [
        ("auto", "cpu", 0, None, 1),
        ("auto", "cpu", 0, 0, 1),
        (3, "cpu", 0, 0, 3),
        ("auto", "cuda", 4, None, 4),
        ("auto", "cuda", 4, 1, 1),
        ("auto", "cuda", 4, 2, 2),
        ("auto", "cuda", 4, 0, 1),
        ("auto", "cuda", 2, 8, 2),
        (2, "cuda", 4, None, 2),
        (4, "cuda", 4, 2, 2),  # what the scheduler gave; the result is the same
        ("auto", "cuda:1", 4, None, 1),
        (1, "cuda:1", 4, 1, 1),
    ],
)
def test_num_processes(monkeypatch, asked, device, visible, given, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert num_processes(asked, torch.device(device), given) == expected


@pytest.mark.parametrize(
    ("device", "text"), [("cuda", "3, but 2 CUDA devices are visible"), ("cuda:0", "3 need device: cuda or auto")]
)
def test_more_processes_than_gpus_are_refused(monkeypatch, device, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"ddpm.num_processes: {text}"):
        num_processes(3, torch.device(device), None)


def test_alone_nothing_is_shared():
    assert not distributed.launched()
    ranks, device = distributed.join(torch.device("cpu"))
    assert (ranks.rank, ranks.count, ranks.main, device.type) == (0, 1, True, "cpu")
    tensor = torch.ones(2)
    assert ranks.sum(tensor) is tensor


WORKER = """
    import os, sys, time
    folder = sys.argv[1]
    from nrcg.cli import _die_with_parent
    _die_with_parent()
    rank = os.environ["RANK"]
    with open(f"{folder}/.{rank}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{folder}/.{rank}", f"{folder}/{rank}")
    while not all(os.path.exists(f"{folder}/{other}") for other in "012"):
        time.sleep(0.01)
    if rank == sys.argv[2]:
        print(f"rank {rank} is ill", file=sys.stderr)
        os._exit(3)
    time.sleep(60)
"""


def script(code: str) -> list[str]:
    """Arguments of the interpreter."""
    return ["-c", textwrap.dedent(code)]


@pytest.mark.parametrize("ill", ["0", "2"])
def test_where_one_fails_all_end_and_its_words_are_shown(tmp_path, capfd, ill):
    began = time.monotonic()
    assert launch([*script(WORKER), str(tmp_path), ill], 3, CPU) == 3
    assert time.monotonic() - began < 45  # not the 60 s that the others would sleep
    assert not any(alive(int((tmp_path / rank).read_text())) for rank in "012")
    assert [line for line in capfd.readouterr().err.splitlines() if "ill" in line] == [f"rank {ill} is ill"]


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "kill"])
def test_the_processes_end_with_the_one_that_started_them(tmp_path, which):
    launcher = FORKS.Process(target=launch, args=([*script(WORKER), str(tmp_path), "none"], 3, CPU))
    launcher.start()
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "012"))
    pids = [int((tmp_path / rank).read_text()) for rank in "012"]
    assert all(alive(pid) for pid in pids)
    os.kill(launcher.pid, which)
    launcher.join(30)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_process_that_a_signal_ends_is_named(capfd):
    code = "import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)"
    assert launch(script(code), 2, CPU) == 137
    assert "one of 2 processes was ended by signal 9" in capfd.readouterr().err


# --- Killed trainings ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and log of a training in one process and in two, in processes of their own."""
    jobs = {}
    for num_ranks in (1, 2):
        jobs[num_ranks] = Job(tmp_path_factory.mktemp("job"), DDPM | {"epochs": 5}, num_ranks, checkpoint_minutes=60)
        jobs[num_ranks].start()
        jobs[num_ranks].wait()
    return {num_ranks: job.result() for num_ranks, job in jobs.items()}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_kill_9_at_any_moment_changes_nothing(tmp_path, uninterrupted, num_ranks):
    """Three kills at random moments, also in the middle of a step or of writing a checkpoint, which comes after every
    step. Bit for bit: the sum of two processes' gradients does not depend on their order."""
    rng = random.Random(num_ranks)
    job = Job(tmp_path / "job", DDPM | {"epochs": 5}, num_ranks)
    reached = []
    for _ in range(3):
        job.start()
        wait_until(lambda: job.steps.value > max(reached, default=0))
        time.sleep(rng.uniform(0, 0.15))
        job.kill()
        reached.append(job.steps.value)
        assert not (job.folder / "weights.pt").exists()
    assert reached == sorted(reached)  # each went on from where the last was
    job.start()
    job.wait()
    weights, log = job.result()
    assert log == uninterrupted[num_ranks][1]
    assert all(torch.equal(value, uninterrupted[num_ranks][0][name]) for name, value in weights.items())


def test_two_processes_train_what_one_does(uninterrupted):
    """Each image has the noise of its place in the whole batch; the losses may differ by float32's rounding alone."""
    (one, log_of_one), (two, log_of_two) = uninterrupted[1], uninterrupted[2]
    assert [row["epoch"] for row in log_of_two] == list(range(1, 6))
    for ours, theirs in zip(log_of_one, log_of_two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert_almost_same_weights(two, one)


def test_another_number_of_processes_takes_a_training_up(tmp_path, uninterrupted):
    first = Job(tmp_path / "job", DDPM | {"epochs": 5}, 2)
    first.start()
    wait_until(lambda: first.steps.value >= 3)
    first.kill()
    second = Job(tmp_path / "job", DDPM | {"epochs": 5}, 1, checkpoint_minutes=60)
    second.start()
    second.wait()
    for ours, theirs in zip(second.result()[1], uninterrupted[1][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_kill_9_of_a_classifiers_training_changes_nothing(tmp_path):
    config = CLASSIFIER | {"epochs": 30}
    whole = Job(tmp_path / "whole", config, checkpoint_minutes=60)
    whole.start()
    whole.wait()
    job = Job(tmp_path / "killed", config)
    job.start()
    wait_until(lambda: job.steps.value >= 40)
    job.kill()
    assert not (job.folder / "weights.pt").exists()
    job.start()
    job.wait()
    (weights, log), (expected, expected_log) = job.result(), whole.result()
    assert log == expected_log
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
