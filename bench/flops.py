"""Floating-point operations of a piece of work, and how many a device can do: the share of the peak that is used."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention in `work`, forward and backward passes alike; a
    multiplication and an addition count as two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention as plain matrix products: some fused kernels are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 20) -> float:
    """Operations per second of a large matrix product: what the device reaches where nothing holds it up.

    Args:
        size: of the square matrices; None: 8192 on a GPU, 512 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    began = now(device)
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (now(device) - began)


def now(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
