"""Products of all pairs of features, block by block: fast in float32, made again in float64 where rounding decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch

BLOCK = 1024
"""Rows of a block: its distances to another one fit into a processor's cache."""
WIDTH_MULTIPLE = 16
GROUP = 16
SPARE = 3
"""Neighbours kept beyond those that are asked for, to find the nearest in float64 among them."""
SINGLE, DOUBLE = 3e-6, 1e-14
"""Parts of the two squared norms that rounding changes of a squared distance at most, in float32 and float64."""
MAX_SMALL = 30.0
"""Largest part of x.y / dim beyond its mean whose cube float32 sums up without losing the distance of two sets."""
MAX_UNSURE = 0.01
"""Part of the pairs, or points, that may be looked at again in float64."""
KEPT_BYTES = 2**30
"""Prepared features of a set are kept up to this size, beyond it each block is prepared anew for every other."""
EXACT_PAIRS = 2**22
"""Pairs up to which products are float64."""
_Result = TypeVar("_Result")


class Uncertain(Exception):
    """Rounding decides too much: float64 is needed."""


def with_enough_digits(
    compute: Callable[[torch.dtype, torch.device], _Result], pairs: int, device: str | torch.device
) -> _Result:
    """What `compute` finds in float32 where that is enough, else in float64."""
    device = torch.device(device)
    if pairs > EXACT_PAIRS:
        try:
            return compute(torch.float32, device)
        except Uncertain:
            pass
    return compute(torch.float64, torch.device("cpu") if device.type == "mps" else device)  # mps has no float64


class Block(NamedTuple):
    """A block of a set: its place and, on the device, (b, width) rows [y, 1, |y|^2] and (b,) y.c + |y|^2 / 2.

    norms, linear: (b,) float64 of |y|^2 and y.c.
    """

    place: slice
    right: torch.Tensor
    terms: torch.Tensor
    norms: np.ndarray
    linear: np.ndarray

    def left(self, dim: int) -> torch.Tensor:
        """(b, width) rows [-2 y, |y|^2, 1]."""
        rows = self.right * -2
        rows[:, dim], rows[:, dim + 1] = self.right[:, dim + 1], 1
        return rows


class Blocks:
    """Blocks of (n, dim) features on the device, centred, so that a product of a left and a right one is at once their
    squared distances: [-2 x, |x|^2, 1] . [y, 1, |y|^2] = |x - y|^2.

    Centring on c leaves distances as they are and makes them exact in few digits. The terms give back the inner
    products of what was centred: (x + c).(y + c) = c.c + x.c + y.c + x.y, x.y = |x|^2 / 2 + |y|^2 / 2 - |x - y|^2 / 2.
    """

    def __init__(self, features: np.ndarray, centre: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.features, self.centre, self.device, self.dtype = features, torch.from_numpy(centre), device, dtype
        self._keep = features.size * dtype.itemsize <= KEPT_BYTES
        self._kept: dict[int, Block] = {}

    def __iter__(self) -> Iterator[Block]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Block]:
        for start in range(first, len(self.features), BLOCK):
            block = self._kept.get(start) or self._prepare(start)
            if self._keep:
                self._kept[start] = block
            yield block

    def _prepare(self, start: int) -> Block:
        rows = torch.from_numpy(np.asarray(self.features[start : start + BLOCK], np.float64)) - self.centre
        norms, linear = torch.linalg.vecdot(rows, rows), rows @ self.centre
        count, dim = rows.shape
        if self.dtype == torch.float32 and norms.max() + linear.abs().max() > MAX_SMALL * dim:
            raise Uncertain
        right = torch.zeros(count, -(-(dim + 2) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, dtype=self.dtype)
        right[:, :dim], right[:, dim], right[:, dim + 1] = rows, 1, norms
        tensors = (tensor.to(self.dtype).to(self.device) for tensor in (right, linear + norms / 2))
        return Block(slice(start, start + count), *tensors, norms.numpy(), linear.numpy())


def squared_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared distances of the rows of two blocks, not below zero."""
    return (left @ right.T).clamp_(min=0)


def kernel_rest(squares: torch.Tensor, x: Block, y: Block, constant: float, dim: int) -> torch.Tensor:
    """What the KID kernel (a + s)^3 has beyond a^3 + 3 a^2 s, with x.y / dim + 1 = a + s and a = c.c / dim + 1.

    The first two terms are large, alike for all pairs or linear, and cancel in the distance: their sums are known in
    float64 (`kernel_sums`), and what is left keeps its digits. Binkowski et al. 2018 (arXiv 1801.01401).
    """
    small = torch.add((x.terms / dim)[:, None], squares, alpha=-0.5 / dim).add_((y.terms / dim)[None])
    return (small + 3 * constant).mul_(small).mul_(small)


def kernel_sums(rest: np.ndarray, linear: np.ndarray, count: int, constant: float) -> np.ndarray:
    """Sums of the kernel over `count` points whose mean is c, so that those of x.y and y.c are 0.

    rest: (n,) sums of `kernel_rest`. linear: (n,) x.c / dim.
    """
    return rest + count * (constant**3 + 3 * constant**2 * linear)


def smallest(squares: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k) smallest of each row of (n, m), ascending, and their columns; all of them where m < k.

    The k smallest lie in the k groups with the smallest minima, so that only those are looked through: several times
    faster than to sort out all m.
    """
    n, m = squares.shape
    if m % GROUP or m < GROUP * k:
        return torch.topk(squares, min(k, m), largest=False)
    groups = squares.view(n, GROUP, m // GROUP)  # the members of a group lie apart, so that minima are of vectors
    places = torch.topk(groups.amin(dim=1), k, largest=False).indices
    members = groups.gather(2, places[:, None].expand(n, GROUP, k)).reshape(n, GROUP * k)
    values, chosen = torch.topk(members, k, largest=False)
    return values, chosen // k * (m // GROUP) + places.gather(1, chosen % k)


def smallest_in_columns(squares: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`smallest` of the transpose, without turning all of it."""
    n, m = squares.shape
    if n % GROUP or n < GROUP * k:
        return torch.topk(squares.T, min(k, n), largest=False)
    groups = squares.view(GROUP, n // GROUP, m)
    places = torch.topk(groups.amin(dim=0).T.contiguous(), k, largest=False).indices
    members = groups.gather(1, places.T[None].expand(GROUP, k, m)).reshape(GROUP * k, m).T.contiguous()
    values, chosen = torch.topk(members, k, largest=False)
    return values, chosen // k * (n // GROUP) + places.gather(1, chosen % k)


def exact_squares(a: np.ndarray, rows: np.ndarray, b: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of some pairs, in float64."""
    found = np.empty(len(rows))
    step = max(1, 2**18 // a.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        apart = torch.from_numpy(a[rows[part]]).double().sub_(torch.from_numpy(b[columns[part]]))
        found[part] = torch.linalg.vecdot(apart, apart).numpy()
    return found


def exact_nearest(
    features: np.ndarray, nearest: np.ndarray, others: np.ndarray, norms: np.ndarray, k: int
) -> np.ndarray:
    """(n, k) float64 squared distances to the nearest others, from a few more found in float32."""
    n, kept = nearest.shape
    exact = np.sort(exact_squares(features, np.arange(n).repeat(kept), features, others.ravel()).reshape(n, kept))
    if kept < n - 1:
        # A point left out may be as near as the last one kept, less what rounding can have made of both.
        error = SINGLE * (norms + norms.max())
        (unsure,) = np.nonzero(nearest[:, -1] - 2 * error < exact[:, k - 1])
        if len(unsure) > 100 + MAX_UNSURE * n:
            raise Uncertain
        exact[unsure, :k] = _nearest_of(features, unsure, k)
    return exact[:, :k]


def _nearest_of(features: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """(r, k) squared distances of some rows to their nearest others, by products in float64."""
    centre = exact_mean(features)
    x = features[rows].astype(np.float64) - centre
    nearest = np.full((len(rows), 0), np.inf)
    for start in range(0, len(features), BLOCK):
        y = np.asarray(features[start : start + BLOCK], np.float64) - centre
        squares = np.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T, 0)
        own = (rows >= start) & (rows < start + len(y))
        squares[own.nonzero()[0], rows[own] - start] = np.inf
        nearest = np.sort(np.concatenate([nearest, squares], axis=1), axis=1)[:, :k]
    return nearest


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()


def exact_mean(features: np.ndarray) -> np.ndarray:
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), BLOCK):
        total += features[start : start + BLOCK].sum(axis=0, dtype=np.float64)
    return total / len(features)
