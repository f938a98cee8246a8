"""Which GPUs there are, and whose turn it is. Imports no torch: the Snakefile asks too."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nrcg.files import try_lock


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA device."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def lease_cuda_device(num_devices: int, folder: str | Path = ".nrcg/leases", poll_seconds: float = 1.0) -> int:
    """The number of a CUDA device that no other leasing process of this machine holds; waits until one is free.

    Snakemake counts GPUs but does not say which one a job has; a lock file per device does.

    Args:
        num_devices: visible CUDA devices, >= 1.
        folder: of the lock files, shared by the jobs.
    """
    # Jobs that see different devices by CUDA_VISIBLE_DEVICES must not share a lock.
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    while True:
        for device in range(num_devices):
            name = names[device].strip() if device < len(names) and names[device].strip() else str(device)
            if try_lock(Path(folder) / f"{os.uname().nodename}-{name}.lock"):
                return device
        time.sleep(poll_seconds)
