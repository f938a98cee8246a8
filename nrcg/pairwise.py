"""Metrics that compare every image with every other: KID, precision and recall, density and coverage, diversity.

All of them come from one blockwise pass over the inner products of two sets, so memory beyond the features is
O(BLOCK * (BLOCK + dim)), and at most KEPT_BYTES a set, whatever their number. Products are float64 up to EXACT_PAIRS
pairs, above that float32, for twice the speed: then every comparison that rounding could decide is made again in
float64, and where these are many (tight clusters, an outlier far from all others) all products are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from nrcg.errors import DataError
from nrcg.intervals import Estimate, mean, share

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
PRECISION_K = 3
"""Neighbours of precision and recall, as published."""
DENSITY_K = 5
"""Neighbours of density and coverage, as published."""
OFF_MANIFOLD_QUANTILE = 0.999

_Result = TypeVar("_Result")


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


class _Uncertain(Exception):
    """Rounding decides too much: float64 is needed."""


def _with_enough_digits(
    compute: Callable[[torch.dtype, torch.device], _Result], pairs: int, device: str | torch.device
) -> _Result:
    """What `compute` finds in float32 where that is enough, else in float64."""
    device = torch.device(device)
    if pairs > EXACT_PAIRS:
        try:
            return compute(torch.float32, device)
        except _Uncertain:
            pass
    return compute(torch.float64, torch.device("cpu") if device.type == "mps" else device)  # mps has no float64


class _Block(NamedTuple):
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


class _Blocks:
    """Blocks of (n, dim) features on the device, centred, so that a product of a left and a right one is at once their
    squared distances: [-2 x, |x|^2, 1] . [y, 1, |y|^2] = |x - y|^2.

    Centring on c leaves distances as they are and makes them exact in few digits. The terms give back the inner
    products of what was centred: (x + c).(y + c) = c.c + x.c + y.c + x.y, x.y = |x|^2 / 2 + |y|^2 / 2 - |x - y|^2 / 2.
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
        norms, linear = torch.linalg.vecdot(rows, rows), rows @ self.centre
        count, dim = rows.shape
        if self.dtype == torch.float32 and norms.max() + linear.abs().max() > MAX_SMALL * dim:
            raise _Uncertain
        right = torch.zeros(count, -(-(dim + 2) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, dtype=self.dtype)
        right[:, :dim], right[:, dim], right[:, dim + 1] = rows, 1, norms
        tensors = (tensor.to(self.dtype).to(self.device) for tensor in (right, linear + norms / 2))
        return _Block(slice(start, start + count), *tensors, norms.numpy(), linear.numpy())


def _squares(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Squared distances of the rows of two blocks, not below zero."""
    return (left @ right.T).clamp_(min=0)


def _kernel_rest(squares: torch.Tensor, x: _Block, y: _Block, constant: float, dim: int) -> torch.Tensor:
    """What the KID kernel (a + s)^3 has beyond a^3 + 3 a^2 s, with x.y / dim + 1 = a + s and a = c.c / dim + 1.

    The first two terms are large, alike for all pairs or linear, and cancel in the distance: their sums are known in
    float64 (`_kernel_sums`), and what is left keeps its digits. Binkowski et al. 2018 (arXiv 1801.01401).
    """
    small = torch.add((x.terms / dim)[:, None], squares, alpha=-0.5 / dim).add_((y.terms / dim)[None])
    return (small + 3 * constant).mul_(small).mul_(small)


def _kernel_sums(rest: np.ndarray, linear: np.ndarray, count: int, constant: float) -> np.ndarray:
    """Sums of the kernel over `count` points whose mean is c, so that those of x.y and y.c are 0.

    rest: (n,) sums of `_kernel_rest`. linear: (n,) x.c / dim.
    """
    return rest + count * (constant**3 + 3 * constant**2 * linear)


def _smallest(squares: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _smallest_in_columns(squares: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`_smallest` of the transpose, without turning all of it."""
    n, m = squares.shape
    if n % GROUP or n < GROUP * k:
        return torch.topk(squares.T, min(k, n), largest=False)
    groups = squares.view(GROUP, n // GROUP, m)
    places = torch.topk(groups.amin(dim=0).T.contiguous(), k, largest=False).indices
    members = groups.gather(1, places.T[None].expand(GROUP, k, m)).reshape(GROUP * k, m).T.contiguous()
    values, chosen = torch.topk(members, k, largest=False)
    return values, chosen // k * (n // GROUP) + places.gather(1, chosen % k)


def _exact_squares(a: np.ndarray, rows: np.ndarray, b: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Squared distances of some pairs, in float64."""
    found = np.empty(len(rows))
    step = max(1, 2**18 // a.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        apart = torch.from_numpy(a[rows[part]]).double().sub_(torch.from_numpy(b[columns[part]]))
        found[part] = torch.linalg.vecdot(apart, apart).numpy()
    return found


def fixed_choice(count: int, most: int | None) -> np.ndarray:
    """Numbers, ascending, of the rows that are compared in pairs: all, or `most` of them chosen at random, always the
    same, so that sorted images (by class, say) are compared as well as mixed ones."""
    return smallest_keys(np.random.default_rng(0).random(count), most)


def smallest_keys(keys: np.ndarray, most: int | None) -> np.ndarray:
    """Places, ascending, of the `most` smallest keys; of all where `most` is None."""
    return np.sort(np.argsort(keys, kind="stable")[:most])


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
    n = len(features)
    if n < 2:
        raise DataError(f"pairs need at least 2 images, got {n}")
    chosen = np.ones(n) if chosen is None else np.asarray(chosen, np.float64)
    return _with_enough_digits(
        lambda dtype, device: _within(features, min(k, n - 1), chosen, dtype, device), n * n, device
    )


def _within(features: np.ndarray, k: int, chosen: np.ndarray, dtype: torch.dtype, device: torch.device) -> Within:
    n, dim = features.shape
    centre = _mean(features)
    constant = float(centre @ centre) / dim + 1
    weights, ones = (torch.from_numpy(array).to(dtype).to(device) for array in (chosen, np.ones(n)))
    kept = min(k + SPARE, n - 1)
    nearest = torch.full((n, kept), torch.inf, dtype=dtype, device=device)
    others = torch.zeros((n, kept), dtype=torch.int64, device=device)
    rest, distance, norms, linear = (np.zeros(n) for _ in range(4))
    blocks = _Blocks(features, centre, device, dtype)

    def keep_nearest(rows: slice, few: torch.Tensor, columns: torch.Tensor) -> None:
        values, places = torch.topk(torch.cat([nearest[rows], few], dim=1), kept, largest=False)
        nearest[rows], others[rows] = values, torch.cat([others[rows], columns], dim=1).gather(1, places)

    for x in blocks:
        i, left = x.place, x.left(dim)
        norms[i], linear[i] = x.norms, x.linear / dim
        for y in blocks.starting_at(i.start):
            j = y.place
            squares = _squares(left, y.right)
            values = _kernel_rest(squares, x, y, constant, dim)
            if i == j:
                values.fill_diagonal_(0)
                squares.fill_diagonal_(torch.inf)
            few, columns = _smallest(squares, kept)
            keep_nearest(i, few, columns + j.start)
            rest[i] += _numbers(values @ ones[j])
            if i == j:
                squares.fill_diagonal_(0)
            else:
                few, columns = _smallest_in_columns(squares, kept)
                keep_nearest(j, few, columns + i.start)
                rest[j] += _numbers(ones[i] @ values)
            roots = squares.sqrt_()
            distance[i] += _numbers(roots @ weights[j])
            if i != j:
                distance[j] += _numbers(weights[i] @ roots)
    # Over all others: without the point itself, whose rest was left out.
    kernel = _kernel_sums(rest, linear, n, constant) - constant**3 - 3 * constant**2 * (2 * linear + norms / dim)
    found = _numbers(nearest)
    if dtype == torch.float32:
        found = _exact_nearest(features, found, others.cpu().numpy(), norms, k)
    return Within(found[:, :k], kernel, distance * chosen)


def _exact_nearest(
    features: np.ndarray, nearest: np.ndarray, others: np.ndarray, norms: np.ndarray, k: int
) -> np.ndarray:
    """(n, k) float64 squared distances to the nearest others, from a few more found in float32."""
    n, kept = nearest.shape
    exact = np.sort(_exact_squares(features, np.arange(n).repeat(kept), features, others.ravel()).reshape(n, kept))
    if kept < n - 1:
        # A point left out may be as near as the last one kept, less what rounding can have made of both.
        error = SINGLE * (norms + norms.max())
        (unsure,) = np.nonzero(nearest[:, -1] - 2 * error < exact[:, k - 1])
        if len(unsure) > 100 + MAX_UNSURE * n:
            raise _Uncertain
        exact[unsure, :k] = _nearest_of(features, unsure, k)
    return exact[:, :k]


def _nearest_of(features: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """(r, k) squared distances of some rows to their nearest others, by products in float64."""
    centre = _mean(features)
    x = features[rows].astype(np.float64) - centre
    nearest = np.full((len(rows), 0), np.inf)
    for start in range(0, len(features), BLOCK):
        y = np.asarray(features[start : start + BLOCK], np.float64) - centre
        squares = np.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T, 0)
        own = (rows >= start) & (rows < start + len(y))
        squares[own.nonzero()[0], rows[own] - start] = np.inf
        nearest = np.sort(np.concatenate([nearest, squares], axis=1), axis=1)[:, :k]
    return nearest


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
    n, m = len(samples), len(reference)

    def radii(inner: Within, k: int) -> np.ndarray:
        """(n,) squared radii to the k-th neighbour; infinite where a set is too small to have one."""
        return inner.nearest[:, k - 1] if inner.nearest.shape[1] >= k else np.full(len(inner.nearest), np.inf)

    balls = _Balls(
        radii(samples_within, precision_k), radii(reference_within, precision_k), radii(reference_within, density_k)
    )
    return _with_enough_digits(lambda dtype, device: _across(samples, reference, balls, dtype, device), n * m, device)


class _Balls(NamedTuple):
    """Squared radii: (n,) of the samples' balls for recall, (m,) of the reference's for precision and for density."""

    sample: np.ndarray
    reference: np.ndarray
    wide: np.ndarray


def _across(
    samples: np.ndarray, reference: np.ndarray, balls: _Balls, dtype: torch.dtype, device: torch.device
) -> Across:
    n, m, dim = len(samples), len(reference), reference.shape[1]
    part = SINGLE if dtype == torch.float32 else DOUBLE
    centre = _mean(reference)
    constant = float(centre @ centre) / dim + 1
    rest, linear, nearest = np.zeros(n), np.zeros(n), np.full(n, np.inf)
    inside, dense = np.zeros(n), np.zeros(n)
    recalled, recalled_by, covered, covered_by = (np.zeros(m) for _ in range(4))
    reference_blocks = _Blocks(reference, centre, device, dtype)
    for x in _Blocks(samples, centre, device, dtype):
        i, left = x.place, x.left(dim)
        linear[i] = x.linear / dim
        for y in reference_blocks:
            j = y.place
            squares = _squares(left, y.right)
            rest[i] += _numbers(_kernel_rest(squares, x, y, constant, dim) @ torch.ones_like(y.terms))
            nearest[i] = np.minimum(nearest[i], _numbers(squares.amin(dim=1)))
            # Few pairs are in any ball, and only those are looked at further.
            widest = np.maximum(balls.reference[j], balls.wide[j]) + part * (y.norms + x.norms.max())
            recalling = balls.sample[i] + part * (x.norms + y.norms.max())
            near = squares <= torch.from_numpy(widest).to(dtype).to(device)
            near |= squares <= torch.from_numpy(recalling).to(dtype).to(device)[:, None]
            places = near.nonzero(as_tuple=True)
            apart = _numbers(squares[places])
            rows, columns = (place.cpu().numpy() for place in places)
            sample, ball, wide = balls.sample[i][rows], balls.reference[j][columns], balls.wide[j][columns]
            error = part * (x.norms[rows] + y.norms[columns])
            if dtype == torch.float32:
                unsure = np.minimum.reduce([abs(apart - radius) for radius in (sample, ball, wide)]) <= error
                if unsure.sum() > 100 + MAX_UNSURE * squares.numel():
                    raise _Uncertain
                again = unsure.nonzero()[0]
                apart[again] = _exact_squares(samples, i.start + rows[again], reference, j.start + columns[again])
                error = DOUBLE * (x.norms[rows] + y.norms[columns])
            inside[i] += np.bincount(rows[apart <= ball + error], minlength=len(x.norms))
            covers = apart < wide - error
            dense[i] += np.bincount(rows[covers], minlength=len(x.norms))
            # Counts, and the sum of the samples' numbers: where the count is 1, the sum is that one's number.
            for hits, count, owner in (
                (apart <= sample + error, recalled, recalled_by),
                (covers, covered, covered_by),
            ):
                count[j] += np.bincount(columns[hits], minlength=len(y.norms))
                owner[j] += np.bincount(columns[hits], i.start + rows[hits], minlength=len(y.norms))
    kernel = _kernel_sums(rest, linear, m, constant)
    return Across(kernel, inside, dense, recalled, recalled_by, covered, covered_by, nearest)


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
