"""Batches as large as the memory allows. No result depends on them, so they may shrink under way."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch

from nrcg.errors import DataError

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
Result = TypeVar("Result")

MOST_ON_CPU = 32
"""Larger batches are no faster on a CPU, and there is no error to catch when the system runs out of memory."""
SHARE_OF_CUDA = 0.85
SHARE_OF_CPU = 0.4
"""Of the free memory; jobs beside this one need theirs."""
_TRIALS = (2, 6)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, RuntimeError) and re.search(text, str(error)) is not None


def in_batches(total: int, batch_size: int, work: Callable[[range], Result]) -> list[Result]:
    """work(range) over 0..total in batches; where memory runs out, the batch is done again in halves.

    Returns:
        The results in order.

    Raises:
        DataError: one image alone does not fit.
    """
    results: list[Result] = []
    first = 0
    while first < total:
        batch = range(first, min(first + batch_size, total))
        failed = False
        try:
            results.append(work(batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                reason = str(error).splitlines()[0]
                raise DataError(f"one image alone does not fit into the memory ({reason})") from error
            failed = True
        # Outside of `except`: the exception holds on to the tensors that filled the memory.
        if failed:
            batch_size = len(batch) // 2
            logger.warning("out of memory with batches of %d; going on with %d", len(batch), batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        first = batch.stop
    return results


def largest_batch(trial: Callable[[int], object], most: int, device: torch.device) -> int:
    """The largest batch that fits, judged by the memory that small ones take.

    Args:
        trial: does with n images what the real work does with a batch.
        most: no larger than this.

    Returns:
        1..most; on the CPU at most MOST_ON_CPU, and that where the system does not tell its memory.
    """
    if device.type != "cuda":
        most = min(most, MOST_ON_CPU)
    if most <= _TRIALS[0]:
        return most
    peaks = _cuda_peaks(trial, device) if device.type == "cuda" else _cpu_peaks(trial)
    free = _free_bytes(device)
    if free is None or peaks is None:
        return most
    per_image = (peaks[1] - peaks[0]) / (_TRIALS[1] - _TRIALS[0])
    if per_image <= 0:
        return most
    return int(min(max((free - (peaks[0] - _TRIALS[0] * per_image)) / per_image, 1), most))


def _cuda_peaks(trial: Callable[[int], object], device: torch.device) -> list[int]:
    """Bytes that the trials take at their peak beyond what is held anyway."""
    peaks = []
    for size in (1, *_TRIALS):  # the first also loads libraries
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        trial(size)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return peaks[1:]


def _cpu_peaks(trial: Callable[[int], object]) -> list[int] | None:
    """The same of the process; None where the system does not tell. Sizes rise, and the peak counts from before the
    first: what a trial has freed stays with the process, so that only the growth of the peak is known."""
    try:
        trial(1)  # loads libraries
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
        before = _status_bytes("VmRSS")
        peaks = []
        for size in _TRIALS:
            trial(size)
            peaks.append(_status_bytes("VmHWM") - before)
        return peaks
    except OSError:  # no Linux
        return None


def _status_bytes(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _free_bytes(device: torch.device) -> float | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return SHARE_OF_CUDA * (torch.cuda.mem_get_info(device)[0] + cached)
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None
    cgroup = Path("/sys/fs/cgroup")
    try:  # a container's limit
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return SHARE_OF_CPU * free
