"""Metrics of generated images, computed from features (`nrcg.features`) and from a judge's logits.

A metric is named after its protocol: `fid`, `cfid`, `kid` and `ckid` are clean-fid's values on its Inception
features; on any other features the same formulas are called `fd_<extractor>`, `cfd_`, `kd_` and `ckd_`. The
prefix `c` means "against the reference images of the target class alone" (cFID in the paper).
"""

import contextlib
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nrcg.errors import DataError

logger = logging.getLogger(__name__)

KID_SUBSET_SIZE = 1000  # clean-fid's default
_ROWS = 4096  # rows turned to float64 at a time


class MetricNames(NamedTuple):
    """Column names of one extractor's distances; the `class_` ones compare with the target class alone."""

    frechet: str
    class_frechet: str
    kernel: str
    class_kernel: str


def metric_names(extractor_name: str) -> MetricNames:
    """`fid, cfid, kid, ckid` for "inception"; `fd_, cfd_, kd_, ckd_<name>` for any other name.

    Raises ValueError unless the name is made of lower-case letters, digits and underscores: it goes into
    column names.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", extractor_name):
        raise ValueError(f"extractor name {extractor_name!r} must be lower-case letters, digits and underscores")
    if extractor_name == "inception":
        return MetricNames("fid", "cfid", "kid", "ckid")
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
    """Mean and covariance of features, summed up so that shards can be computed apart and merged.

    n: number of feature vectors. total: (dim,) float64, their sum. outer: (dim, dim) float64, the sum of
    their outer products. Float64 sums lose about (mean / std)^2 * 1e-16 of the covariance: nothing for
    network features.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.total = np.zeros(dim)
        self.outer = np.zeros((dim, dim))

    @classmethod
    def from_features(cls, features: np.ndarray) -> "FeatureStatistics":
        """Statistics of (N, dim) features; errors as in `update`."""
        _check_features(features)
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.total)

    @property
    def mean(self) -> np.ndarray:
        """(dim,) float64. Raises DataError without any features."""
        if self.n < 1:
            raise DataError("a mean needs at least 1 feature vector, got 0")
        return self.total / self.n

    @property
    def cov(self) -> np.ndarray:
        """(dim, dim) float64, unbiased (divided by n - 1, as np.cov). Raises DataError if n < 2."""
        if self.n < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        mean = self.mean
        return (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)

    def update(self, features: np.ndarray) -> None:
        """Add (N, dim) features. Raises ValueError for another shape, DataError for non-finite values."""
        _check_features(features, self.dim)
        for block in _float64_blocks(features, _ROWS):
            if not np.isfinite(block).all():
                raise DataError("features are not all finite")
            self.n += len(block)
            self.total += block.sum(axis=0)
            self.outer += block.T @ block

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the features that `other` has seen. Raises ValueError if the dimensions differ."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of dimensions {self.dim} and {other.dim}")
        self.n += other.n
        self.total = self.total + other.total
        self.outer = self.outer + other.outer

    def save(self, path: str | Path) -> None:
        """Write an .npz of plain arrays (n, total, outer), at once: a reader never sees half a file."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            np.savez(file, n=np.int64(self.n), total=self.total, outer=self.outer)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read what `save` wrote. Raises DataError for any other file; pickled arrays are refused."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                n, total, outer = int(arrays["n"]), arrays["total"], arrays["outer"]
        except (OSError, EOFError, KeyError, ValueError, TypeError, IndexError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no feature statistics: {error}") from error
        if n < 0 or total.ndim != 1 or outer.shape != (len(total), len(total)):
            raise DataError(f"{path} holds no feature statistics: shapes {total.shape}, {outer.shape}")
        statistics = cls(len(total))
        statistics.n = n
        statistics.total = total.astype(np.float64)
        statistics.outer = outer.astype(np.float64)
        return statistics


def frechet_distance(stats_a: FeatureStatistics, stats_b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500, eq. 6), computed by clean-fid's `frechet_distance`. Rounding may
    leave a value near zero slightly negative. Where clean-fid fails (its call no longer fits scipy 1.18; an
    "imaginary component" of singular covariances), the same trace comes from a symmetric eigenproblem, and
    the log says so. Raises ValueError if the dimensions differ, DataError if a side has fewer than 2 feature
    vectors.
    """
    import cleanfid.fid

    if stats_a.dim != stats_b.dim:
        raise ValueError(f"cannot compare features of dimensions {stats_a.dim} and {stats_b.dim}")
    moments = (stats_a.mean, stats_a.cov, stats_b.mean, stats_b.cov)
    try:
        with warnings.catch_warnings():
            # scipy: sqrtm's argument `disp` is deprecated, and a singular product is inexact.
            warnings.simplefilter("ignore")
            return float(cleanfid.fid.frechet_distance(*moments))
    except (TypeError, ValueError) as error:
        logger.warning("clean-fid's frechet_distance failed (%s); using the symmetric eigenvalue form instead", error)
        return _symmetric_frechet_distance(*moments)


def _symmetric_frechet_distance(mu_a: np.ndarray, cov_a: np.ndarray, mu_b: np.ndarray, cov_b: np.ndarray) -> float:
    """The same by Tr (C_a C_b)^(1/2) = Tr (C_a^(1/2) C_b C_a^(1/2))^(1/2), real for any covariances."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    trace = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mu_a - mu_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)


def kernel_distance(feats_a: np.ndarray, feats_b: np.ndarray, seed: int = 0) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3, unbiased, so it may be negative.

    KID of Binkowski et al. 2018 (arXiv 1801.01401), computed by clean-fid's `kernel_distance` in float64: the
    mean over 100 pairs of subsets of m = min(Na, Nb, 1000) vectors, drawn without replacement. If both sets
    have m vectors every subset is the whole set: one is taken. feats_a: (Na, dim), feats_b: (Nb, dim); seed:
    in [0, 2^32). numpy's global random state, which clean-fid draws from, is put back. Not safe beside
    threads that draw from it. Raises ValueError for other shapes, DataError if a side has fewer than 2
    vectors.
    """
    from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

    _check_features(feats_a)
    _check_features(feats_b, feats_a.shape[1])
    if min(len(feats_a), len(feats_b)) < 2:
        raise DataError(f"a kernel distance needs 2 images a side, got {len(feats_a)} and {len(feats_b)}")
    num_subsets = 1 if len(feats_a) == len(feats_b) <= KID_SUBSET_SIZE else 100
    with _global_seed(seed):
        return cleanfid_kernel_distance(
            np.asarray(feats_a, dtype=np.float64),
            np.asarray(feats_b, dtype=np.float64),
            num_subsets=num_subsets,
            max_subset_size=KID_SUBSET_SIZE,
        )


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002 - clean-fid draws from the legacy global generator
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, *, block_size: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1, 2), in [0, 1].

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest
    neighbour in the same set (the point itself not counted). precision: share of samples inside the
    reference's manifold (are they realistic?). recall: share of reference points inside the samples' manifold
    (is all of it covered?).

    reference: (Nr, dim), samples: (Ns, dim). Every pair is compared, in float64; memory beyond the inputs is
    O(block_size * (block_size + dim)). Time: at most about 2 (Nr + Ns)^2 dim operations.
    Raises ValueError for other shapes, DataError if a set has no more than k points.
    """
    _check_features(reference)
    _check_features(samples, reference.shape[1])
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if min(len(reference), len(samples)) <= k:
        raise DataError(
            f"precision and recall need more than k = {k} images a side, "
            f"got {len(reference)} reference images and {len(samples)} samples"
        )
    reference_radii = _squared_radii(reference, k, block_size)
    sample_radii = _squared_radii(samples, k, block_size)
    sample_inside = np.zeros(len(samples), dtype=bool)
    reference_inside = np.zeros(len(reference), dtype=bool)
    for i, reference_block in _numbered_blocks(reference, block_size):
        for j, sample_block in _numbered_blocks(samples, block_size):
            distances = _squared_distances(reference_block, sample_block)
            sample_inside[j] |= (distances <= reference_radii[i, None]).any(axis=0)
            reference_inside[i] |= (distances <= sample_radii[None, j]).any(axis=1)
    return float(sample_inside.mean()), float(reference_inside.mean())


def _squared_radii(points: np.ndarray, k: int, block_size: int) -> np.ndarray:
    """(N,) squared distance of each point to its k-th nearest other point."""
    radii = np.empty(len(points))
    for i, rows in _numbered_blocks(points, block_size):
        nearest = np.full((len(rows), k), np.inf)
        for j, columns in _numbered_blocks(points, block_size):
            distances = _squared_distances(rows, columns)
            if i == j:
                np.fill_diagonal(distances, np.inf)
            candidates = np.concatenate([nearest, distances], axis=1)
            nearest = np.partition(candidates, k - 1, axis=1)[:, :k]
        radii[i] = nearest[:, k - 1]
    return radii


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Na, Nb) squared Euclidean distances of float64 rows by |a|^2 + |b|^2 - 2 a.b."""
    scale = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :]
    distances = scale - 2 * (a @ b.T)
    # What is left between equal points is rounding, which must not decide a comparison with a radius of zero.
    distances[distances <= 1e-13 * scale] = 0
    return distances


def _numbered_blocks(features: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    for start, block in zip(range(0, len(features), size), _float64_blocks(features, size), strict=True):
        yield slice(start, start + len(block)), block


def _float64_blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(features), size):
        yield np.asarray(features[start : start + size], dtype=np.float64)


def _check_features(features: np.ndarray, dim: int | None = None) -> None:
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        raise ValueError(f"features must be (N, {dim or 'dim'}), got shape {features.shape}")


def evaluate_samples(
    samples_features: np.ndarray,
    reference_features: np.ndarray,
    reference_labels: np.ndarray,
    target: int,
    name: str,
    seed: int,
) -> dict[str, float]:
    """All feature metrics of one set of samples, by column name (see `metric_names`).

    samples_features: (N, dim). reference_features: (M, dim), the images that the samples should look like.
    reference_labels: (M,) class indices. target: the class that guidance aimed at. name: the extractor's.
    seed: for the kernel distance's subsets.

    Fréchet and kernel distance come twice: against all of the reference, and (prefix `c`) against its images
    of the target class. `precision` and `recall` compare with the target class alone: samples guided to one
    class ought not to cover the others, so a recall over all classes would punish success. Raises DataError
    if the target class has too few reference images or there are too few samples (at least 4 each).
    """
    names = metric_names(name)
    labels = np.asarray(reference_labels)
    if labels.shape != (len(reference_features),):
        raise ValueError(f"{len(reference_features)} reference features but labels of shape {labels.shape}")
    target_features = reference_features[labels == target]
    if len(target_features) == 0:
        raise DataError(f"the reference set has no image of the target class {target}")
    samples = FeatureStatistics.from_features(samples_features)
    precision, recall = precision_recall(target_features, samples_features)
    return {
        names.frechet: frechet_distance(samples, FeatureStatistics.from_features(reference_features)),
        names.class_frechet: frechet_distance(samples, FeatureStatistics.from_features(target_features)),
        names.kernel: kernel_distance(samples_features, reference_features, seed),
        names.class_kernel: kernel_distance(samples_features, target_features, seed),
        "precision": precision,
        "recall": recall,
    }


def target_share(logits: np.ndarray, target: int) -> float:
    """Share, in [0, 1], of samples whose largest logit is the target's: the paper's "accuracy".

    logits: (N, K), N >= 1. K = 1 is a binary classifier: class 1 where the logit is positive, else class 0.
    Raises ValueError for another shape or a target that is no class, DataError for logits that are not
    finite.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be (N, K) with N and K at least 1, got shape {logits.shape}")
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target {target} is none of the {logits.shape[1]} classes")
    if not np.isfinite(logits).all():
        raise DataError("logits are not all finite")
    return float((logits.argmax(axis=1) == target).mean())


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval (low, high) of a share, successes out of n; z = 1.96 gives about 95 %.

    Wilson 1927, J. Am. Stat. Assoc. 22: unlike share +- z * standard error it stays inside [0, 1] and keeps a
    width at 0 and n. Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    centre = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return max(0.0, float(low)), min(1.0, float(high))
