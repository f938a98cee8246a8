"""Metrics that compare every image with every other: KID, precision and recall, density and coverage, diversity.

All of them come from one blockwise pass over the inner products of two sets, so memory beyond the features is
O(BLOCK * (BLOCK + dim)), and at most KEPT_BYTES a set, whatever their number. Products are float64 up to EXACT_PAIRS
pairs, above that float32 of centred features with float64 sums: a relative error of about 1e-6 of a squared distance,
for three times the speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nrcg.errors import DataError
from nrcg.intervals import Estimate, mean, share

BLOCK = 1024
"""Rows of a block: its distances to another one fit into a processor's cache."""
WIDTH_MULTIPLE = 16
GROUP = 16
KEPT_BYTES = 2**30
"""Prepared features of a set are kept up to this size, beyond it each block is prepared anew for every other."""
EXACT_PAIRS = 2**22
"""Pairs up to which products are float64."""
PRECISION_K = 3
"""Neighbours of precision and recall, as published."""
DENSITY_K = 5
"""Neighbours of density and coverage, as published."""
OFF_MANIFOLD_QUANTILE = 0.999


@dataclass(frozen=True)
class Within:
    """What the pairs of one set of n say; float64 arrays.

    nearest: (n, K) squared distances of each point to its K nearest others, ascending; K = min(DENSITY_K, n - 1) or as
    asked. kernel: (n,) sums of the KID kernel over all other points. distance: (n,) sums of the Euclidean distance to
    the other points that were chosen, 0 for points that were not.
    """

    nearest: np.ndarray
    kernel: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class Across:
    """What the pairs of n samples and m reference points say.

    kernel: (n,) sums of the KID kernel over the reference. inside: (n,) number of reference balls of PRECISION_K that
    hold a sample; dense: (n,) the same of DENSITY_K. recalled, covered: (m,) number of sample balls that hold a
    reference point, number of samples in a reference point's ball. recalled_by, covered_by: (m,) the one sample where
    that number is 1. nearest: (n,) squared distance to the nearest reference point.
    """

    kernel: np.ndarray
    inside: np.ndarray
    dense: np.ndarray
    recalled: np.ndarray
    recalled_by: np.ndarray
    covered: np.ndarray
    covered_by: np.ndarray
    nearest: np.ndarray


def _precision(pairs: int, device: torch.device) -> tuple[torch.dtype, float]:
    """Type of the products and the part of a squared norm that rounding may change."""
    if device.type == "mps" or pairs > EXACT_PAIRS:  # mps has no float64
        return torch.float32, 1.5e-6
    return torch.float64, 1e-14


class _Block(NamedTuple):
    """A block's place in its set; (b, width) rows [y, 1, |y|^2]; (b,) |y|^2; (b,) terms of the kernel."""

    place: slice
    right: torch.Tensor
    norms: torch.Tensor
    terms: torch.Tensor

    def left(self, dim: int) -> torch.Tensor:
        """(b, width) rows [-2 y, |y|^2, 1]."""
        rows = self.right * -2
        rows[:, dim], rows[:, dim + 1] = self.norms, 1
        return rows


class _Blocks:
    """Blocks of (n, dim) features on the device, centred, so that a product of a left and a right one is at once their
    squared distances: [-2 x, |x|^2, 1] . [y, 1, |y|^2] = |x - y|^2.

    Centring leaves distances as they are and makes them exact in few digits. The terms x.c + |x|^2 / 2 give back the
    inner products of what was centred: (x + c).(y + c) = (x.c + |x|^2 / 2) + (y.c + |y|^2 / 2) + c.c - |x - y|^2 / 2.
    """

    def __init__(self, features: np.ndarray, centre: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.features, self.centre, self.device, self.dtype = features, torch.from_numpy(centre), device, dtype
        self._keep = features.size * dtype.itemsize <= KEPT_BYTES
        self._kept: dict[int, _Block] = {}

    def __iter__(self) -> Iterator[_Block]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[_Block]:
        for start in range(first, len(self.features), BLOCK):
            block = self._kept.get(start) or self._prepare(start)
            if self._keep:
                self._kept[start] = block
            yield block

    def _prepare(self, start: int) -> _Block:
        rows = torch.from_numpy(np.asarray(self.features[start : start + BLOCK], np.float64)) - self.centre
        norms = torch.linalg.vecdot(rows, rows)
        terms = rows @ self.centre + norms / 2
        count, dim = rows.shape
        right = torch.zeros(count, -(-(dim + 2) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, dtype=self.dtype)
        right[:, :dim], right[:, dim], right[:, dim + 1] = rows, 1, norms
        tensors = (tensor.to(self.dtype).to(self.device) for tensor in (right, norms, terms))
        return _Block(slice(start, start + count), *tensors)


def _squares(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared distances of the rows of two blocks, not below zero."""
    return (left @ right.T).clamp_(min=0)


def _kernel(squares: torch.Tensor, terms_a: torch.Tensor, terms_b: torch.Tensor, constant: float) -> torch.Tensor:
    """(x.y + dim)^3, given constant = c.c + dim: the KID kernel (x.y / dim + 1)^3 of Binkowski et al. 2018 (arXiv
    1801.01401) times dim^3."""
    base = torch.add((terms_a + constant)[:, None], squares, alpha=-0.5).add_(terms_b[None])
    return (base * base).mul_(base)


def _smallest(squares: torch.Tensor, k: int) -> torch.Tensor:
    """(n, k) smallest of each row of (n, m), ascending; all of them where m < k.

    The k smallest lie in the k groups with the smallest minima, so that only those are looked through: several times
    faster than to sort out all m.
    """
    n, m = squares.shape
    if m % GROUP or m < GROUP * k:
        return torch.topk(squares, min(k, m), largest=False).values
    groups = squares.view(n, GROUP, m // GROUP)  # the members of a group lie apart, so that minima are of vectors
    places = torch.topk(groups.amin(dim=1), k, largest=False).indices
    members = groups.gather(2, places[:, None].expand(n, GROUP, k))
    return torch.topk(members.reshape(n, GROUP * k), k, largest=False).values


def _smallest_in_columns(squares: torch.Tensor, k: int) -> torch.Tensor:
    """`_smallest` of the transpose, without turning all of it."""
    n, m = squares.shape
    if n % GROUP or n < GROUP * k:
        return torch.topk(squares.T, min(k, n), largest=False).values
    groups = squares.view(GROUP, n // GROUP, m)
    places = torch.topk(groups.amin(dim=0).T.contiguous(), k, largest=False).indices
    members = groups.gather(1, places.T[None].expand(GROUP, k, m))
    return torch.topk(members.reshape(GROUP * k, m).T.contiguous(), k, largest=False).values


def check_features(features: np.ndarray, dim: int | None = None) -> None:
    """Raises ValueError unless (N, dim), DataError unless finite."""
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        raise ValueError(f"features must be (N, {dim or 'dim'}), got shape {features.shape}")
    for start in range(0, len(features), BLOCK):
        if not np.isfinite(features[start : start + BLOCK]).all():
            raise DataError("features are not all finite")


def within(
    features: np.ndarray,
    *,
    k: int = DENSITY_K,
    chosen: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> Within:
    """Pairs of one set: each pair is computed once.

    features: (n, dim), n >= 2. k: neighbours kept. chosen: (n,) bool, points whose distances count; None: all.
    """
    check_features(features)
    n, dim = features.shape
    if n < 2:
        raise DataError(f"pairs need at least 2 images, got {n}")
    device = torch.device(device)
    dtype, _ = _precision(n * n, device)
    centre = _mean(features)
    constant = float(centre @ centre) + dim
    k = min(k, n - 1)
    weights = torch.from_numpy(np.ones(n) if chosen is None else np.asarray(chosen, np.float64)).to(dtype).to(device)
    ones = torch.ones(n, dtype=dtype, device=device)
    nearest = torch.full((n, k), torch.inf, dtype=dtype, device=device)
    kernel, distance = np.zeros(n), np.zeros(n)
    blocks = _Blocks(features, centre, device, dtype)

    def keep_nearest(rows: slice, few: torch.Tensor) -> None:
        nearest[rows] = torch.topk(torch.cat([nearest[rows], few], dim=1), k, largest=False).values

    for x in blocks:
        i, left = x.place, x.left(dim)
        for y in blocks.starting_at(i.start):
            j = y.place
            squares = _squares(left, y.right)
            values = _kernel(squares, x.terms, y.terms, constant)
            if i == j:
                values.fill_diagonal_(0)
                squares.fill_diagonal_(torch.inf)
            keep_nearest(i, _smallest(squares, k))
            kernel[i] += _numbers(values @ ones[j])
            if i == j:
                squares.fill_diagonal_(0)
            else:
                keep_nearest(j, _smallest_in_columns(squares, k))
                kernel[j] += _numbers(ones[i] @ values)
            roots = squares.sqrt_()
            distance[i] += _numbers(roots @ weights[j])
            if i != j:
                distance[j] += _numbers(weights[i] @ roots)
    return Within(_numbers(nearest), kernel / dim**3, distance * _numbers(weights))


def across(
    samples: np.ndarray,
    reference: np.ndarray,
    samples_within: Within,
    reference_within: Within,
    *,
    precision_k: int = PRECISION_K,
    density_k: int = DENSITY_K,
    device: str | torch.device = "cpu",
) -> Across:
    """Pairs of samples (n, dim) and reference (m, dim), given the pairs within each.

    A point on the edge of a ball is inside for precision and recall (Kynkäänniemi et al. 2019, eq. 1: <=) and outside
    for density and coverage (Naeem et al. 2020, as their code counts: <); what rounding
    could have moved counts as on it.
    """
    check_features(reference)
    check_features(samples, reference.shape[1])
    n, m, dim = len(samples), len(reference), reference.shape[1]
    device = torch.device(device)
    dtype, part = _precision(n * m, device)
    centre = _mean(reference)
    constant = float(centre @ centre) + dim

    def ball(nearest: np.ndarray, k: int, place: slice) -> torch.Tensor:
        """Squared radii to the k-th neighbour; infinite where a set is too small to have one."""
        radii = nearest[place, k - 1] if nearest.shape[1] >= k else np.full(place.stop - place.start, np.inf)
        return torch.from_numpy(radii).to(dtype).to(device)

    kernel, nearest = np.zeros(n), np.full(n, np.inf)
    inside, dense = np.zeros(n), np.zeros(n)
    recalled, recalled_by, covered, covered_by = (np.zeros(m) for _ in range(4))
    reference_blocks = _Blocks(reference, centre, device, dtype)
    for x in _Blocks(samples, centre, device, dtype):
        i, left = x.place, x.left(dim)
        x_ball = ball(samples_within.nearest, precision_k, i)
        x_edge = x_ball + part * (x.norms + x_ball)
        for y in reference_blocks:
            j = y.place
            squares = _squares(left, y.right)
            kernel[i] += _numbers(_kernel(squares, x.terms, y.terms, constant) @ torch.ones_like(y.norms))
            nearest[i] = np.minimum(nearest[i], _numbers(squares.amin(dim=1)))
            y_ball = ball(reference_within.nearest, precision_k, j)
            y_wide = ball(reference_within.nearest, density_k, j)
            y_edge, y_wide = y_ball + part * (y.norms + y_ball), y_wide - part * (y.norms + y_wide)
            # Few pairs are in any ball, and only those are looked at further.
            near = squares <= torch.maximum(y_edge, y_wide)
            near |= squares <= x_edge[:, None]
            rows, columns = near.nonzero(as_tuple=True)
            apart = squares[rows, columns]
            inside[i] += _counts(rows[apart <= y_edge[columns]], x)
            covers = apart < y_wide[columns]
            dense[i] += _counts(rows[covers], x)
            # Counts, and the sum of the samples' numbers: where the count is 1, the sum is that one's number.
            for hits, count, owner in (
                (apart <= x_edge[rows], recalled, recalled_by),
                (covers, covered, covered_by),
            ):
                found = _counts(columns[hits], y)
                count[j] += found
                owner[j] += _counts(columns[hits], y, rows[hits]) + i.start * found
    return Across(kernel / dim**3, inside, dense, recalled, recalled_by, covered, covered_by, nearest)


def _counts(places: torch.Tensor, block: _Block, weights: torch.Tensor | None = None) -> np.ndarray:
    """How often each place of a block is named, or the sum of the weights given to it."""
    return _numbers(torch.bincount(places, weights, minlength=len(block.norms)))


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()


def _mean(features: np.ndarray) -> np.ndarray:
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), BLOCK):
        total += features[start : start + BLOCK].sum(axis=0, dtype=np.float64)
    return total / len(features)


def kernel_estimate(samples: Within, reference: Within, pairs: Across) -> Estimate:
    """Squared maximum mean discrepancy with the KID kernel: the unbiased U-statistic over all pairs, may be negative.

    Binkowski et al. 2018 (arXiv 1801.01401). It has the expectation of the usual mean over random subsets, without
    their randomness. Influence: (n - 1) times what leaving a sample out changes. Raises DataError with fewer than 2 a
    side.
    """
    n, m = len(samples.kernel), len(reference.kernel)
    among, between = samples.kernel.sum(), pairs.kernel.sum()
    constant = reference.kernel.sum() / (m * (m - 1))
    value = among / (n * (n - 1)) + constant - 2 * between / (n * m)
    if n < 3:
        return Estimate(float(value))
    without = (
        (among - 2 * samples.kernel) / ((n - 1) * (n - 2)) + constant - 2 * (between - pairs.kernel) / ((n - 1) * m)
    )
    return Estimate(float(value), (n - 1) * (value - without))


def neighbour_estimates(reference: Within, pairs: Across) -> dict[str, Estimate]:
    """precision, recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density, coverage (Naeem et al. 2020, arXiv
    2002.09797) and off_manifold, the share of samples farther from every reference point than 99.9 % of reference
    points are from their nearest other.

    Recall and coverage ask whether any sample reaches a reference point, so leaving a sample out loses the points
    that it alone reaches; that is its influence, with the other samples' balls held fixed. As shares of the reference
    points they have Wilson's interval over these besides.
    """
    n = len(pairs.inside)
    apart = np.quantile(reference.nearest[:, 0], OFF_MANIFOLD_QUANTILE)
    return {
        "precision": share(pairs.inside > 0),
        "recall": _reached(pairs.recalled, pairs.recalled_by, n),
        "density": mean(pairs.dense / DENSITY_K, low=0.0),
        "coverage": _reached(pairs.covered, pairs.covered_by, n),
        "off_manifold": share(pairs.nearest > apart),
    }


def _reached(count: np.ndarray, owner: np.ndarray, n: int) -> Estimate:
    alone = np.bincount(owner[count == 1].astype(np.int64), minlength=n)
    over_reference = share(count > 0)
    return Estimate(over_reference.value, (n - 1) * alone / len(count), 0.0, 1.0, also=over_reference.interval)


def mean_pair_distance(pairs: Within, chosen: np.ndarray | None = None) -> Estimate:
    """Mean Euclidean distance of the pairs of chosen points, as given to `within`; nan with fewer than 2 of them."""
    chosen = np.ones(len(pairs.distance), bool) if chosen is None else np.asarray(chosen, bool)
    n, m = len(chosen), int(chosen.sum())
    if m < 2:
        return Estimate(float("nan"))
    total = pairs.distance.sum() / 2
    value = total / (m * (m - 1) / 2)
    if m < 3:
        return Estimate(float(value))
    without = np.where(chosen, (total - pairs.distance) / ((m - 1) * (m - 2) / 2), value)
    return Estimate(float(value), (n - 1) * (value - without), low=0.0)


def kernel_distance(feats_a: np.ndarray, feats_b: np.ndarray, *, device: str | torch.device = "cpu") -> float:
    """KID of two sets of features, (Na, dim) and (Nb, dim): the value of `kernel_estimate`."""
    check_features(feats_b, feats_a.shape[1] if feats_a.ndim == 2 else None)
    if min(len(feats_a), len(feats_b)) < 2:
        raise DataError(f"a kernel distance needs 2 images a side, got {len(feats_a)} and {len(feats_b)}")
    a, b = within(feats_a, device=device), within(feats_b, device=device)
    return kernel_estimate(a, b, across(feats_a, feats_b, a, b, device=device)).value


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = PRECISION_K, *, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1, 2), in [0, 1].

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest other.
    precision: share of samples inside the reference's manifold (are they realistic?). recall: share of reference
    points inside the samples' manifold (is all of it covered?).

    reference: (Nr, dim), samples: (Ns, dim). Raises ValueError for other shapes, DataError if a set has no more than k
    points.
    """
    pairs = _all_pairs(reference, samples, k, k, device)
    return float(np.mean(pairs.inside > 0)), float(np.mean(pairs.recalled > 0))


def density_coverage(
    reference: np.ndarray, samples: np.ndarray, k: int = DENSITY_K, *, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eqs. 3, 4).

    With the reference's balls as in `precision_recall`: density is the mean number of balls that hold a sample, over k
    (may exceed 1); coverage the share of balls that hold any sample. Arguments and errors as there.
    """
    pairs = _all_pairs(reference, samples, k, k, device)
    return float(np.mean(pairs.dense) / k), float(np.mean(pairs.covered > 0))


def _all_pairs(
    reference: np.ndarray, samples: np.ndarray, precision_k: int, density_k: int, device: str | torch.device
) -> Across:
    check_features(reference)
    check_features(samples, reference.shape[1])
    k = max(precision_k, density_k)
    if min(precision_k, density_k) < 1:
        raise ValueError(f"k must be at least 1, got {min(precision_k, density_k)}")
    require_neighbours(len(samples), len(reference), k)
    inner = [within(features, k=k, device=device) for features in (samples, reference)]
    return across(samples, reference, *inner, precision_k=precision_k, density_k=density_k, device=device)


def require_neighbours(num_samples: int, num_reference: int, k: int = DENSITY_K) -> None:
    """Raises DataError unless both sets have more than k images."""
    if min(num_samples, num_reference) <= k:
        raise DataError(
            f"neighbours need more than k = {k} images a side, got {num_reference} reference images and "
            f"{num_samples} samples"
        )
