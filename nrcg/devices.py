"""Devices: which there are, whose turn it is, and in which precision they compute.

Imports torch where a function needs it alone: the Snakefile asks too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg.errors import DataError
from nrcg.files import try_lock
from nrcg.processes import launched

if TYPE_CHECKING:
    import torch
    from torch import nn


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


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises DataError for a device not there."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DataError(f"device: {device} is not there; {torch.cuda.device_count()} CUDA devices are visible")
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32."""
    import torch

    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without these instructions the CPU emulates bfloat16 and loses time.
    native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast of the networks; parameters, x_t, losses and gradients stay in float32."""
    import torch

    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no parameter gradients: guidance needs the gradient of its input alone."""
    return module.eval().requires_grad_(False)


def acquire_device(asked: str, threads: int | None = None) -> torch.device:
    """A device for this process; also sets its number of CPU threads.

    Under the workflow, where several jobs share the GPUs, one is leased until the process ends.

    Args:
        asked: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads, shared by the processes of a training; None leaves torch's.
    """
    import torch

    if launched():
        threads = threads or os.cpu_count() or 1
        torch.set_num_threads(max(threads // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), 1))
    elif threads:
        torch.set_num_threads(threads)
    device = resolve_device(asked)
    if device.type == "cuda" and device.index is None and os.environ.get("NRCG_WORKFLOW") and not launched():
        device = torch.device("cuda", lease_cuda_device(cuda_uuids()))
    return device


def cuda_uuids() -> list[str]:
    """The visible GPUs' names, the same in every process whatever each of them sees."""
    import torch

    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def device_name(device: torch.device) -> str:
    """The GPU's model, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the CUDA allocator, or the process's resident set on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
