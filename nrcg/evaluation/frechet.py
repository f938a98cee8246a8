"""Metrics of generated images, computed from features and from a judge's logits.

A metric is named after its protocol: `fid`, `cfid`, `kid` and `ckid` use clean-fid's Inception features,
`fid_torcheval` and so on those of torcheval's Inception; on any other features the same formulas are called
`fd_<extractor>`, `cfd_`, `kd_` and `ckd_`. The prefix `c` means "against the reference images of the target class
alone" (cFID in the paper). docs/evaluation.md defines every column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nrcg.errors import DataError
from nrcg.evaluation.intervals import Estimate

EXACT_PRODUCTS = 2**30
"""Multiplications up to which the influences on a Fréchet distance are float64."""
_ROWS = 2048  # rows turned to float64 at a time


class MetricNames(NamedTuple):
    """Column names of one extractor's distances; the `class_` ones compare with the target class alone."""

    frechet: str
    class_frechet: str
    kernel: str
    class_kernel: str


def metric_names(extractor_name: str) -> MetricNames:
    """`fid, cfid, kid, ckid` for "inception", the same with `_torcheval` for "torcheval"; else `fd_, cfd_, kd_,
    ckd_<name>`.

    Raises ValueError unless the name is made of lower-case letters, digits and underscores: it goes into
    column names.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", extractor_name):
        raise ValueError(f"extractor name {extractor_name!r} must be lower-case letters, digits and underscores")
    if extractor_name == "inception":
        return MetricNames("fid", "cfid", "kid", "ckid")
    if extractor_name == "torcheval":
        return MetricNames("fid_torcheval", "cfid_torcheval", "kid_torcheval", "ckid_torcheval")
    return MetricNames(*(f"{prefix}_{extractor_name}" for prefix in ("fd", "cfd", "kd", "ckd")))


def rank_warning(n: int, dim: int) -> str | None:
    """A sentence for the report if n samples cannot give a covariance of full rank (n <= dim), else None."""
    if n > dim:
        return None
    return (
        f"{n} samples give a {dim}-dimensional covariance of rank {max(n - 1, 0)} at most: the Fréchet "
        "distance is biased upwards, compare it only with values from the same number of samples"
    )


class FeatureStatistics:
    """Mean and covariance of features, summed up in float64 so that shards can be computed apart and merged.

    n: number of feature vectors. centre: (dim,) their mean, 0 without any. scatter: (dim, dim), the sum of the outer
    products of their deviations from it. Merged by Chan, Golub and LeVeque 1983 (Am. Stat. 37, eq. 2.1), which keeps
    its digits however far from 0 the features lie.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.centre = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @classmethod
    def from_features(cls, features: np.ndarray) -> FeatureStatistics:
        """Statistics of (N, dim) features; errors as in `update`."""
        _check_features(features)
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.centre)

    @property
    def mean(self) -> np.ndarray:
        """(dim,) float64. Raises DataError without any features."""
        if self.n < 1:
            raise DataError("a mean needs at least 1 feature vector, got 0")
        return self.centre

    @property
    def cov(self) -> np.ndarray:
        """(dim, dim) float64, unbiased (divided by n - 1, as np.cov). Raises DataError if n < 2."""
        if self.n < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)

    @property
    def cov_trace(self) -> float:
        """Trace of `cov`, the sum of the variances."""
        return float(self.scatter.trace() / (self.n - 1))

    def update(self, features: np.ndarray) -> None:
        """Add (N, dim) features. Raises ValueError for another shape, DataError for non-finite values."""
        _check_features(features, self.dim)
        for block in _float64_blocks(features, _ROWS):
            if not np.isfinite(block).all():
                raise DataError("features are not all finite")
            centre = block.mean(axis=0)
            deviations = block - centre
            self._add(len(block), centre, deviations.T @ deviations)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the features that `other` has seen. Raises ValueError if the dimensions differ."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of dimensions {self.dim} and {other.dim}")
        self._add(other.n, other.centre, other.scatter)

    def _add(self, n: int, centre: np.ndarray, scatter: np.ndarray) -> None:
        if n == 0:
            return
        apart, total = centre - self.centre, self.n + n
        self.scatter = self.scatter + scatter
        if self.n > 0:
            self.scatter += np.outer(apart, apart * (self.n * n / total))
        self.centre = self.centre + apart * (n / total)
        self.n = total


def covariance_factor(cov: np.ndarray) -> np.ndarray:
    """A (dim, dim) matrix F with F F' = cov: Cholesky's, or, where cov is singular, its symmetric root.

    Eigenvalues that rounding made negative count as zero.
    """
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_distance(stats_a: FeatureStatistics, stats_b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500, eq. 6). The trace is that of (F' C_b F)^(1/2) with C_a = F F', which has the
    same eigenvalues, is symmetric and so needs no matrix square root: real for any covariances, singular ones too,
    and many times faster than `scipy.linalg.sqrtm`. Rounding may leave a value near zero slightly negative. Raises
    ValueError if the dimensions differ, DataError if a side has fewer than 2 feature vectors.
    """
    if stats_a.dim != stats_b.dim:
        raise ValueError(f"cannot compare features of dimensions {stats_a.dim} and {stats_b.dim}")
    factor = covariance_factor(stats_a.cov)
    values = np.linalg.eigvalsh(factor.T @ stats_b.cov @ factor)
    trace = _roots(values, min(stats_a.n, stats_b.n) - 1).sum()
    return _moments_distance(stats_a, stats_b, trace)


def _moments_distance(a: FeatureStatistics, b: FeatureStatistics, trace: float) -> float:
    return float(((a.mean - b.mean) ** 2).sum() + a.cov_trace + b.cov_trace - 2 * trace)


def frechet_estimate(
    features: np.ndarray, statistics: FeatureStatistics, reference: FeatureStatistics, factor: np.ndarray
) -> Estimate:
    """Fréchet distance of samples to a reference, and each sample's influence on it.

    features: (n, dim) of the samples. statistics: of the same samples. reference, factor: the reference's statistics
    and `covariance_factor` of its covariance R = F F', made once for many sets of samples.

    The derivative of Tr (F' C F)^(1/2) by C is A / 2 with A = F (F' C F)^(-1/2) F', the optimal transport from N(., C)
    to N(., R), so that sample z = x - mu moves the distance by 2 (mu - mu_R).z + |z|^2 - z'A z, up to its mean over
    the samples. With n <= dim the same is computed from the n x n Gram matrix. The distance is float64 throughout;
    z'A z, which only the interval needs, is float32 for more than EXACT_PRODUCTS multiplications. Raises ValueError if
    shapes do not fit, DataError if a side has fewer than 2 feature vectors.
    """
    _check_features(features, reference.dim)
    n, dim = features.shape
    if statistics.n != n or statistics.dim != dim:
        raise ValueError(f"{n} feature vectors of {dim}, but statistics of {statistics.n} of {statistics.dim}")
    mean, shift = statistics.mean, statistics.mean - reference.mean
    turn = None
    if n > dim:
        values, vectors = np.linalg.eigh(factor.T @ statistics.cov @ factor)
        power = _roots(values, reference.n - 1)
        # turn = F V w^(-1/4), so that |z turn|^2 = z'A z with w = power^2; without the smallest w, of which rounding
        # has left too little to divide by and whose part of z'A z is as small.
        large = power > power[-1] * np.sqrt(dim * np.finfo(float).eps)
        turn = factor @ (vectors * np.where(large, np.where(large, power, 1) ** -0.5, 0))
        turn = turn.astype(np.float32 if n * dim * dim > EXACT_PRODUCTS else np.float64)
        transported = np.empty(n)
    else:
        rows = (np.asarray(features, np.float64) - mean) @ factor / np.sqrt(n - 1)
        values, vectors = np.linalg.eigh(rows @ rows.T)
        power = _roots(values, min(n, reference.n) - 1)
        transported = (n - 1) * (vectors**2 @ power)
    influence = np.empty(n)
    for start, block in zip(range(0, n, _ROWS), _float64_blocks(features, _ROWS), strict=True):
        rows, place = block - mean, slice(start, start + len(block))
        if turn is not None:
            transported[place] = _row_norms(rows.astype(turn.dtype) @ turn)
        influence[place] = (_row_norms(rows) - transported[place]) * (n / (n - 1)) + rows @ (2 * shift)
    value = _moments_distance(statistics, reference, power.sum())
    return Estimate(value, influence - influence.mean(), low=0.0)


def _roots(eigenvalues: np.ndarray, rank: int) -> np.ndarray:
    """Roots of the `rank` largest of ascending eigenvalues, 0 for the others and where rounding made them negative.

    No floor: Cholesky's factor keeps eigenvalues far below the largest one's rounding, and their roots add up.
    """
    kept = np.arange(len(eigenvalues)) >= len(eigenvalues) - rank
    return np.sqrt(np.where(kept, np.maximum(eigenvalues, 0.0), 0.0))


def _row_norms(rows: np.ndarray) -> np.ndarray:
    """(n,) squared norms of (n, dim) rows."""
    return np.einsum("ij,ij->i", rows, rows)


def _float64_blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(features), size):
        yield np.asarray(features[start : start + size], dtype=np.float64)


def _check_features(features: np.ndarray, dim: int | None = None) -> None:
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        raise ValueError(f"features must be (N, {dim or 'dim'}), got shape {features.shape}")
