"""Which GPUs there are, and whose turn it is. Imports no torch: the Snakefile asks too."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

from nrcg.files import try_lock


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA device."""
    return count_nvidia_gpus() > 0


def count_nvidia_gpus() -> int:
    """How many NVIDIA devices this machine shows; CUDA_VISIBLE_DEVICES may show fewer to torch."""
    return sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))


def lease_cuda_device(names: Sequence[str], folder: str | Path = ".nrcg/leases", poll_seconds: float = 1.0) -> int:
    """The position of a device that no other leasing process of this machine holds; waits until one is free.

    Snakemake counts GPUs but does not say which one a job has; a lock file per device does.

    Args:
        names: of the visible devices, the same in every process whatever each of them sees, such as the UUIDs.
        folder: of the lock files, shared by the jobs.
    """
    while True:
        for position, name in enumerate(names):
            if try_lock(Path(folder) / f"{os.uname().nodename}-{name}.lock"):
                return position
        time.sleep(poll_seconds)


def lease_cuda_devices(
    names: Sequence[str], count: int, folder: str | Path = ".nrcg/leases", poll_seconds: float = 1.0
) -> list[int]:
    """Positions of several devices, as `lease_cuda_device` gives one.

    One process at a time gathers devices: two that each held some and waited for the other's would wait for ever.

    Raises:
        ValueError: more devices than there are.
    """
    if count > len(names):
        raise ValueError(f"{count} devices of {len(names)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{os.uname().nodename}-gathering.lock", "a") as gathering:
        fcntl.flock(gathering, fcntl.LOCK_EX)
        return sorted(lease_cuda_device(names, folder, poll_seconds) for _ in range(count))
