"""Batches that fit the memory. No result depends on them, so they may shrink under way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from nrcg.errors import DataError

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
Result = TypeVar("Result")

FIRST = {"cuda": 512, "cpu": 32}
"""Images of 64 x 64 pixels that `auto` begins with. Larger batches are no faster on a CPU, where no error says in time
that memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, Exception) and should_reduce_batch_size(error)


def first_batch(batch_size: BatchSize, device: torch.device, pixels: int) -> int:
    """The size of the first batch: as given, or for `auto` as many images as such a device usually holds.

    Args:
        batch_size: Images at once, or auto.
        device: Device that computes.
        pixels: Of an image, height times width.
    """
    if batch_size != "auto":
        return batch_size
    return max(1, min(FIRST.get(device.type, FIRST["cpu"]), FIRST.get(device.type, FIRST["cpu"]) * 64**2 // pixels))


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
