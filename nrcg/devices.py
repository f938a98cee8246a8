"""Which GPUs there are, and whose turn it is. Imports no torch: the Snakefile asks too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from nrcg.files import try_lock


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA device."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


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
