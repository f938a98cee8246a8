"""Metrics that compare every image with every other: KID, precision and recall, density and coverage, diversity.

All of them come from one blockwise pass over the inner products of two sets, so memory beyond the features is
O(BLOCK * (BLOCK + dim)), and at most KEPT_BYTES a set, whatever their number. Products are float64 up to EXACT_PAIRS
pairs, above that float32 of centred features with float64 sums: a relative error of about 1e-6 of a squared distance,
for three times the speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nrcg.errors import DataError
from nrcg.intervals import Estimate, mean, share

BLOCK = 2048
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


class _Blocks:
    """Blocks of (n, dim) features on the device, centred, with their squared norms and kernel offsets.

    Centring leaves distances as they are and makes them exact in few digits; the kernel's inner products get back
    x.y = (x - c).(y - c) + (x - c).c + (y - c).c + c.c.
    """

    def __init__(self, features: np.ndarray, centre: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.features, self.centre, self.device, self.dtype = features, centre, device, dtype
        self._keep = features.size * dtype.itemsize <= KEPT_BYTES
        self._kept: dict[int, tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for start in range(first, len(self.features), BLOCK):
            block = self._kept.get(start) or self._prepare(start)
            if self._keep:
                self._kept[start] = block
            yield block

    def _prepare(self, start: int) -> tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = np.asarray(self.features[start : start + BLOCK], np.float64) - self.centre
        norms, offsets = np.einsum("ij,ij->i", rows, rows), rows @ self.centre
        x, norms, offsets = (torch.from_numpy(array).to(self.dtype).to(self.device) for array in (rows, norms, offsets))
        return slice(start, start + len(rows)), x, norms, offsets


def _kernel(products: torch.Tensor, offsets_a: torch.Tensor, offsets_b: torch.Tensor, constant: float, dim: int):
    """The KID kernel (x.y / dim + 1)^3 of Binkowski et al. 2018 (arXiv 1801.01401), from centred products."""
    base = torch.add(products, (offsets_b + (constant + dim))[None]).add_(offsets_a[:, None])
    return (base * base).mul_(base).mul_(dim**-3.0)


def _sum(values: torch.Tensor, axis: int) -> np.ndarray:
    return values.sum(dim=axis).cpu().numpy().astype(np.float64)


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
    constant = float(centre @ centre)
    k = min(k, n - 1)
    weights = torch.from_numpy(np.ones(n) if chosen is None else np.asarray(chosen, np.float64)).to(dtype).to(device)
    nearest = torch.full((n, k), torch.inf, dtype=dtype, device=device)
    kernel, distance = np.zeros(n), np.zeros(n)
    blocks = _Blocks(features, centre, device, dtype)

    def keep_nearest(rows: slice, distances: torch.Tensor) -> None:
        few = torch.topk(distances, min(k, distances.shape[1]), largest=False).values
        nearest[rows] = torch.topk(torch.cat([nearest[rows], few], dim=1), k, largest=False).values

    for i, x, x_norms, x_offsets in blocks:
        for j, y, y_norms, y_offsets in blocks.starting_at(i.start):
            products = x @ y.T
            values = _kernel(products, x_offsets, y_offsets, constant, dim)
            squares = torch.add(x_norms[:, None], products, alpha=-2).add_(y_norms[None]).clamp_(min=0)
            if i == j:
                values.fill_diagonal_(0)
                squares.fill_diagonal_(0)
            roots = squares.sqrt()
            kernel[i] += _sum(values, 1)
            distance[i] += (roots @ weights[j]).cpu().numpy()
            if i == j:
                squares.fill_diagonal_(torch.inf)
            else:
                kernel[j] += _sum(values, 0)
                distance[j] += (weights[i] @ roots).cpu().numpy()
                keep_nearest(j, squares.T)
            keep_nearest(i, squares)
    return Within(nearest.double().cpu().numpy(), kernel, distance * weights.double().cpu().numpy())


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
    constant = float(centre @ centre)
    result = Across(*(np.zeros(size) for size in (n, n, n, m, m, m, m)), np.full(n, np.inf))

    def ball(nearest: np.ndarray, k: int, place: slice) -> torch.Tensor:
        """Squared radii to the k-th neighbour; infinite where a set is too small to have one."""
        radii = nearest[place, k - 1] if nearest.shape[1] >= k else np.full(place.stop - place.start, np.inf)
        return torch.from_numpy(radii).to(dtype).to(device)

    for i, x, x_norms, x_offsets in _Blocks(samples, centre, device, dtype):
        x_ball = ball(samples_within.nearest, precision_k, i)
        x_edge = x_ball + part * (x_norms + x_ball)
        counter = torch.stack([torch.ones(len(x)), torch.arange(len(x))], dim=1).to(torch.float32).to(device)
        for j, y, y_norms, y_offsets in _Blocks(reference, centre, device, dtype):
            products = x @ y.T
            result.kernel[i] += _sum(_kernel(products, x_offsets, y_offsets, constant, dim), 1)
            squares = torch.add(x_norms[:, None], products, alpha=-2).add_(y_norms[None]).clamp_(min=0)
            y_ball, y_wide = (
                ball(reference_within.nearest, precision_k, j),
                ball(reference_within.nearest, density_k, j),
            )
            result.inside[i] += _sum(squares <= y_ball + part * (y_norms + y_ball), 1)
            covers = squares < y_wide - part * (y_norms + y_wide)
            result.dense[i] += _sum(covers, 1)
            recalls = squares <= x_edge[:, None]
            # Counts, and the sum of the numbers of those counted: where the count is 1, the sum is that one's number.
            # Numbers are counted from the block's start, so float32 holds them exactly.
            for hits, count, owner in (
                (recalls, result.recalled, result.recalled_by),
                (covers, result.covered, result.covered_by),
            ):
                found = (hits.to(torch.float32).T @ counter).cpu().numpy().astype(np.float64)
                count[j] += found[:, 0]
                owner[j] += found[:, 1] + i.start * found[:, 0]
            result.nearest[i] = np.minimum(result.nearest[i], squares.amin(dim=1).double().cpu().numpy())
    return result


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
