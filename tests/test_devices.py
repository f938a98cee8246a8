"""The lease of GPUs between the processes of a machine. Needs no GPU: a device is a number here."""

import json
import select
import subprocess
import sys
from pathlib import Path

import pytest

from nrcg.devices import has_nvidia_gpu, lease_cuda_devices

# Leases a device, says which, and holds it until its standard input ends.
JOB = """
import sys
from nrcg.devices import lease_cuda_device, lease_cuda_devices
names, folder, count = sys.argv[1].split(','), sys.argv[2], int(sys.argv[3])
one = count == 1
print(lease_cuda_device(names, folder, 0.02) if one else lease_cuda_devices(names, count, folder, 0.02), flush=True)
sys.stdin.read()
"""

# Leases a device, notes that, holds it for a moment, and notes the end just before it gives it back by ending.
TURN = """
import os, sys, time
from nrcg.devices import lease_cuda_device
device = lease_cuda_device(sys.argv[1].split(','), sys.argv[2], poll_seconds=0.02)
notes = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(notes, f'{os.getpid()} {device} begins\\n'.encode())
time.sleep(0.5)
os.write(notes, f'{os.getpid()} {device} ends\\n'.encode())
"""


class Job:
    """A process that leases one of the devices that it sees."""

    def __init__(self, folder: Path, *names: str, count: int = 1):
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, ",".join(names), str(folder), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def device(self) -> int:
        """The device leased; waits for it."""
        return int(self.process.stdout.readline())

    def devices(self) -> list[int]:
        """The devices leased; waits for them."""
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """End as by kill -9."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start_one(*names: str, count: int = 1) -> Job:
        jobs.append(Job(tmp_path / "leases", *names, count=count))
        return jobs[-1]

    yield start_one
    for job in jobs:
        job.kill()


def test_concurrent_processes_get_distinct_devices(start):
    jobs = [start(*"abcd") for _ in range(4)]
    assert sorted(job.device() for job in jobs) == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_jobs", "num_devices"), [(6, 2), (5, 4)])
def test_more_jobs_than_devices_take_turns(tmp_path, num_jobs, num_devices):
    """Each job notes when it begins and ends on its device; no two overlap on one."""
    notes, names = tmp_path / "notes", ",".join(f"GPU-{i:04x}" for i in range(num_devices))
    words = [sys.executable, "-c", TURN, names, str(tmp_path / "leases"), str(notes)]
    jobs = [subprocess.Popen(words) for _ in range(num_jobs)]
    assert [job.wait(timeout=60) for job in jobs] == [0] * num_jobs
    holder: dict[str, str | None] = {}
    turns = 0
    for line in notes.read_text().splitlines():
        job, device, what = line.split()
        assert holder.get(device) == (None if what == "begins" else job)
        holder[device] = job if what == "begins" else None
        turns += what == "begins"
    assert turns == num_jobs
    assert len(holder) == num_devices  # all were used


def test_a_killed_process_gives_its_device_back_to_the_one_that_waits(start):
    first, second = start(*"ab"), start(*"ab")
    held = {first.device(), second.device()}
    assert held == {0, 1}
    third = start(*"ab")
    with pytest.raises(subprocess.TimeoutExpired):
        third.process.wait(timeout=0.5)  # waits, as both are held
    first.kill()
    assert third.device() in held


def test_the_device_that_is_free_is_found(start):
    jobs = {job.device(): job for job in (start(*"abc"), start(*"abc"), start(*"abc"))}
    jobs[1].kill()
    assert start(*"abc").device() == 1


def test_several_devices_go_to_one_process(start):
    one = start(*"abcd")
    held = one.device()
    assert start(*"abcd", count=3).devices() == sorted({0, 1, 2, 3} - {held})


def test_two_that_want_all_devices_take_turns(start):
    """Neither holds some of them while it waits for the others."""
    jobs = [start(*"abc", count=3) for _ in range(2)]
    readable, _, _ = select.select([job.process.stdout for job in jobs], [], [], 60)
    first = next(job for job in jobs if job.process.stdout in readable)
    second = next(job for job in jobs if job is not first)
    assert first.devices() == [0, 1, 2]
    with pytest.raises(subprocess.TimeoutExpired):
        second.process.wait(timeout=0.3)
    first.kill()
    assert second.devices() == [0, 1, 2]


def test_more_devices_than_there_are_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 devices of 2"):
        lease_cuda_devices(["a", "b"], 3, tmp_path)


def test_processes_that_see_different_devices_do_not_wait_for_each_other(start):
    assert [job.device() for job in (start("a"), start("b"))] == [0, 0]


def test_has_nvidia_gpu_says_what_the_machine_shows():
    assert has_nvidia_gpu() == bool(list(Path("/dev").glob("nvidia[0-9]*")))
