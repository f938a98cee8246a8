"""Devices: which there are, whose turn it is, and in which precision they compute.

Imports torch where a function needs it alone: the Snakefile asks too.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
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


def resolve_precision(
    precision: str, device: torch.device, *, training: bool = False, unet_weights: str | None = None
) -> torch.dtype:
    """The autocast: `auto` is a half precision where the device computes in it, else float32; none beside half weights.

    On a GPU float16, whose guidance gradient is ten times as close to float32's as that of bfloat16 at the same speed
    (docs/performance.md); bfloat16 for training, which needs no scaling of the loss by it, and on a CPU.
    """
    import torch

    if unet_weights is not None:
        return torch.float32
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        if not training:
            return torch.float16
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


def floating_type(module: object) -> torch.dtype:
    """Type of a module's first floating parameter or buffer; float32 where there is none."""
    import torch
    from torch import nn

    tensors = itertools.chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
    return next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)


@contextlib.contextmanager
def frozen(*modules: object) -> Iterator[None]:
    """Eval mode and no parameter gradients while it lasts; what each part of a module had is given back after it.

    What is no torch module, such as a plain function, is left alone.
    """
    from torch import nn

    parts = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    gradients = [(one, one.requires_grad) for part in parts for one in part.parameters(recurse=False)]
    try:
        for part, _ in modes:
            part.training = False
        for one, _ in gradients:
            one.requires_grad_(False)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for one, wanted in gradients:
            one.requires_grad_(wanted)


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
