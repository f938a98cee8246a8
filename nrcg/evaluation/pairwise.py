"""Metrics that compare every image with every other: KID, precision and recall, density and coverage, diversity.

All of them come from one blockwise pass over the inner products of two sets, so memory beyond the features is
O(BLOCK * (BLOCK + dim)), and at most KEPT_BYTES a set, whatever their number. Products are float64 up to EXACT_PAIRS
pairs, above that float32, for twice the speed: then every comparison that rounding could decide is made again in
float64, and where these are many (tight clusters, an outlier far from all others) all products are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nrcg.errors import DataError
from nrcg.evaluation.blocks import (
    BLOCK,
    DOUBLE,
    MAX_UNSURE,
    SINGLE,
    SPARE,
    Blocks,
    Uncertain,
    exact_mean,
    exact_nearest,
    exact_squares,
    kernel_rest,
    kernel_sums,
    smallest,
    smallest_in_columns,
    squared_distances,
    to_numpy,
    with_enough_digits,
)
from nrcg.evaluation.intervals import Estimate, mean, share

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
    return with_enough_digits(
        lambda dtype, device: _within(features, min(k, n - 1), chosen, dtype, device), n * n, device
    )


def _within(features: np.ndarray, k: int, chosen: np.ndarray, dtype: torch.dtype, device: torch.device) -> Within:
    n, dim = features.shape
    centre = exact_mean(features)
    constant = float(centre @ centre) / dim + 1
    weights, ones = (torch.from_numpy(array).to(dtype).to(device) for array in (chosen, np.ones(n)))
    kept = min(k + SPARE, n - 1)
    nearest = torch.full((n, kept), torch.inf, dtype=dtype, device=device)
    others = torch.zeros((n, kept), dtype=torch.int64, device=device)
    rest, distance, norms, linear = (np.zeros(n) for _ in range(4))
    blocks = Blocks(features, centre, device, dtype)

    def keep_nearest(rows: slice, few: torch.Tensor, columns: torch.Tensor) -> None:
        values, places = torch.topk(torch.cat([nearest[rows], few], dim=1), kept, largest=False)
        nearest[rows], others[rows] = values, torch.cat([others[rows], columns], dim=1).gather(1, places)

    for x in blocks:
        i, left = x.place, x.left(dim)
        norms[i], linear[i] = x.norms, x.linear / dim
        for y in blocks.starting_at(i.start):
            j = y.place
            squares = squared_distances(left, y.right)
            values = kernel_rest(squares, x, y, constant, dim)
            if i == j:
                values.fill_diagonal_(0)
                squares.fill_diagonal_(torch.inf)
            few, columns = smallest(squares, kept)
            keep_nearest(i, few, columns + j.start)
            rest[i] += to_numpy(values @ ones[j])
            if i == j:
                squares.fill_diagonal_(0)
            else:
                few, columns = smallest_in_columns(squares, kept)
                keep_nearest(j, few, columns + i.start)
                rest[j] += to_numpy(ones[i] @ values)
            roots = squares.sqrt_()
            distance[i] += to_numpy(roots @ weights[j])
            if i != j:
                distance[j] += to_numpy(weights[i] @ roots)
    # Over all others: without the point itself, whose rest was left out.
    kernel = kernel_sums(rest, linear, n, constant) - constant**3 - 3 * constant**2 * (2 * linear + norms / dim)
    found = to_numpy(nearest)
    if dtype == torch.float32:
        found = exact_nearest(features, found, others.cpu().numpy(), norms, k)
    return Within(found[:, :k], kernel, distance * chosen)


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
    return with_enough_digits(lambda dtype, device: _across(samples, reference, balls, dtype, device), n * m, device)


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
    centre = exact_mean(reference)
    constant = float(centre @ centre) / dim + 1
    rest, linear, nearest = np.zeros(n), np.zeros(n), np.full(n, np.inf)
    inside, dense = np.zeros(n), np.zeros(n)
    recalled, recalled_by, covered, covered_by = (np.zeros(m) for _ in range(4))
    reference_blocks = Blocks(reference, centre, device, dtype)
    for x in Blocks(samples, centre, device, dtype):
        i, left = x.place, x.left(dim)
        linear[i] = x.linear / dim
        for y in reference_blocks:
            j = y.place
            squares = squared_distances(left, y.right)
            rest[i] += to_numpy(kernel_rest(squares, x, y, constant, dim) @ torch.ones_like(y.terms))
            nearest[i] = np.minimum(nearest[i], to_numpy(squares.amin(dim=1)))
            # Few pairs are in any ball, and only those are looked at further.
            widest = np.maximum(balls.reference[j], balls.wide[j]) + part * (y.norms + x.norms.max())
            recalling = balls.sample[i] + part * (x.norms + y.norms.max())
            near = squares <= torch.from_numpy(widest).to(dtype).to(device)
            near |= squares <= torch.from_numpy(recalling).to(dtype).to(device)[:, None]
            places = near.nonzero(as_tuple=True)
            apart = to_numpy(squares[places])
            rows, columns = (place.cpu().numpy() for place in places)
            sample, ball, wide = balls.sample[i][rows], balls.reference[j][columns], balls.wide[j][columns]
            error = part * (x.norms[rows] + y.norms[columns])
            if dtype == torch.float32:
                unsure = np.minimum.reduce([abs(apart - radius) for radius in (sample, ball, wide)]) <= error
                if unsure.sum() > 100 + MAX_UNSURE * squares.numel():
                    raise Uncertain
                again = unsure.nonzero()[0]
                apart[again] = exact_squares(samples, i.start + rows[again], reference, j.start + columns[again])
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
    kernel = kernel_sums(rest, linear, m, constant)
    return Across(kernel, inside, dense, recalled, recalled_by, covered, covered_by, nearest)


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
