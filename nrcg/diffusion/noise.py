"""Gaussian noise that belongs to a sample: a function of (seed, sample, step, position) and of nothing else.

Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
written in tensor operations. A sample's noise is the same whatever the batch, the shard, the order or the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each value in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of random words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps into int64's sign; shift and mask recover both halves.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _to_unit(words: Tensor) -> Tensor:
    """Words in [0, 2^32) to float32 in (0, 1]."""
    return (words.to(torch.float32) + 1.0) * 2.0**-32


def sample_noise(
    seed: int, samples: Sequence[int] | Tensor, step: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of some samples at one step (Box-Muller on Philox words).

    Args:
        seed: 64-bit seed of the run.
        samples: (B,) global sample indices, 0 <= index < 2^63.
        step: stream within a sample, 0 <= step < 2^32; the sampler starts with 0 and leaves t with t.
        shape: shape of one sample, e.g. (C, H, W).
        device: where the noise is made.

    Returns:
        (B, *shape) float32. Equal across batches and devices up to the rounding of log, sin and cos.
    """
    index = torch.as_tensor(samples, dtype=torch.int64, device=device).reshape(-1, 1)
    size = math.prod(shape)
    blocks = torch.arange(-(-size // 4), dtype=torch.int64, device=device).reshape(1, -1)
    counter = (blocks, torch.full_like(blocks, step), index & _MASK, (index >> 32) & _MASK)
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    parts = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = _to_unit(radius_word).log_().mul_(-2.0).sqrt_()
        angle = _to_unit(angle_word).mul_(2.0 * math.pi)
        parts += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1).reshape(len(index), -1)[:, :size].reshape(-1, *shape)


def spawn_seed(*words: int) -> int:
    """A 63-bit seed derived from several integers, e.g. (seed, epoch), for a torch.Generator."""
    out = (0, 0, 0, 0)
    for word in words:
        counter = tuple(
            torch.tensor(part, dtype=torch.int64) for part in (*out[:2], word & _MASK, (word >> 32) & _MASK)
        )
        out = tuple(int(part) for part in philox4x32(counter, (out[2], out[3])))
    return (out[0] << 31 | out[1] >> 1) & (2**63 - 1)
