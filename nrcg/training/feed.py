"""Training batches: the order of the images, and how they reach the device before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from nrcg.data.arrays import to_unit
from nrcg.diffusion.noise import spawn_seed

PREFETCH = 4
"""Batches that are read ahead of the one in use."""
READERS = 2
"""Threads that read them."""


class TrainingImages:
    """A split's images as training batches.

    On a CUDA device all images stay there as uint8 where they fit. Otherwise `batches` reads ahead from the memory map
    in threads, into pinned memory for a CUDA device, so that a step finds its batch ready.

    Args:
        images: (N, H, W, C) uint8, an array or memory map.
        labels: (N,) int64.
        resident_bytes: largest size that stays on a CUDA device; None: a quarter of its free memory.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, device: torch.device, resident_bytes: float | None = None
    ):
        self.device = device
        self._array, self._labels = images, torch.from_numpy(np.asarray(labels))
        self._resident: Tensor | None = None
        if device.type == "cuda":
            limit = torch.cuda.mem_get_info(device)[0] / 4 if resident_bytes is None else resident_bytes
            if images.nbytes <= limit:
                self._resident = torch.from_numpy(np.array(images)).to(device)

    def __len__(self) -> int:
        return len(self._array)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, height, width, channels = self._array.shape
        return channels, height, width

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """TrainingImages (B, C, H, W) float32 in [-1, 1] and labels (B,) at some positions."""
        if self._resident is not None:
            return self._finish(self._resident[indices.to(self.device)], indices)
        return self._finish(self._read(indices), indices)

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches at some positions, one after the other, as `batch` gives each."""
        if self._resident is not None:
            for indices in order:
                yield self.batch(indices)
            return
        ahead: deque[tuple[Future, Tensor]] = deque()
        with ThreadPoolExecutor(READERS, thread_name_prefix="images") as readers:
            try:
                for indices in order:
                    ahead.append((readers.submit(self._read, indices), indices))
                    if len(ahead) > PREFETCH:
                        rows, first = ahead.popleft()
                        yield self._finish(rows.result(), first)
                while ahead:
                    rows, first = ahead.popleft()
                    yield self._finish(rows.result(), first)
            finally:
                for rows, _ in ahead:
                    rows.cancel()

    def _read(self, indices: Tensor) -> Tensor:
        """(B, H, W, C) uint8, pinned for a CUDA device."""
        wanted = indices.numpy()
        order = np.argsort(wanted, kind="stable")
        rows = torch.empty(
            (len(wanted), *self._array.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        # The memory map is read forwards, then put in order. np.take lets go of the interpreter's lock.
        rows.numpy()[order] = np.take(self._array, wanted[order], axis=0)
        return rows

    def _finish(self, pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        labels = self._labels[indices].to(self.device, non_blocking=True)
        if self.device.type != "cuda":
            return to_unit(pixels.numpy()).to(self.device), labels
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.float().div_(127.5).sub_(1.0), labels


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Shuffled positions of an epoch in batches; the last, smaller one is dropped unless it is the only one."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(spawn_seed(seed, epoch)))
    for first in range(0, max(num_images - batch_size + 1, 1), batch_size):
        yield order[first : first + batch_size]


def batches_from(num_images: int, batch_size: int, seed: int, step: int, epochs: int) -> Iterator[Tensor]:
    """Positions of all batches of a training of some epochs, from a step on (0 is the first)."""
    epoch, skip = divmod(step, steps_per_epoch(num_images, batch_size))
    for position in range(epoch, epochs):
        batches = epoch_batches(num_images, batch_size, seed, position)
        for index, indices in enumerate(batches):
            if position > epoch or index >= skip:
                yield indices


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    return max(num_images // batch_size, 1)
