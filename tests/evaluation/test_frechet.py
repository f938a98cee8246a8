"""Metrics against closed forms, brute force and the direction that an effect must have."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg.classifiers.logits import calibration_error, target_share
from nrcg.errors import DataError
from nrcg.evaluation import frechet
from nrcg.evaluation.frechet import (
    FeatureStatistics,
    covariance_factor,
    frechet_distance,
    frechet_estimate,
    metric_names,
    rank_warning,
)


def gaussian(n: int, dim: int = 4, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return (shift + scale * np.random.default_rng(seed).normal(size=(n, dim))).astype(np.float32)


def two_modes(n: int, seed: int = 0, centre: float = 10.0) -> np.ndarray:
    """(2n, 4): n points around -centre and n around +centre in every dimension."""
    return np.concatenate([gaussian(n, 4, seed, -centre), gaussian(n, 4, seed + 1000, centre)])


def exact_statistics(mean: np.ndarray, cov: np.ndarray, n: int = 10) -> FeatureStatistics:
    """Statistics of n vectors with exactly this mean and unbiased covariance."""
    statistics = FeatureStatistics(len(mean))
    statistics.n = n
    statistics.centre, statistics.scatter = np.asarray(mean, float), (n - 1) * np.asarray(cov, float)
    return statistics


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_equal_numpys(monkeypatch):
    monkeypatch.setattr(frechet, "_ROWS", 7)  # several blocks
    features = gaussian(50, shift=3.0)
    statistics = FeatureStatistics.from_features(features)
    assert (statistics.n, statistics.dim) == (50, 4)
    np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_merged_shards_equal_the_whole(cuts):
    features = gaussian(40)
    bounds = [0, *sorted(cuts), 40]
    merged = FeatureStatistics(4)
    for start, end in itertools.pairwise(bounds):
        merged.merge(FeatureStatistics.from_features(features[start:end]))
    whole = FeatureStatistics.from_features(features)
    assert merged.n == whole.n
    # Float64 sums in another order.
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-12, atol=1e-12)


def test_merge_leaves_the_other_alone():
    a, b = (FeatureStatistics.from_features(gaussian(5, seed=seed)) for seed in (0, 1))
    before = b.scatter.copy()
    a.merge(b)
    a.update(gaussian(5))
    assert b.n == 5
    np.testing.assert_array_equal(b.scatter, before)


@pytest.mark.parametrize(
    "features, error",
    [
        (np.zeros((3, 5)), ValueError),
        (np.zeros(4), ValueError),
        (np.array([[0, 1, 2, np.nan]]), DataError),
        (np.array([[0, 1, 2, np.inf]]), DataError),
    ],
)
def test_update_refuses(features, error):
    with pytest.raises(error):
        FeatureStatistics(4).update(features)


def test_too_few_features_and_other_dimensions():
    statistics = FeatureStatistics(4)
    with pytest.raises(DataError, match="at least 1"):
        _ = statistics.mean
    statistics.update(gaussian(1))
    with pytest.raises(DataError, match="at least 2 feature vectors, got 1"):
        _ = statistics.cov
    with pytest.raises(ValueError, match="4 and 5"):
        statistics.merge(FeatureStatistics(5))
    with pytest.raises(ValueError, match="4 and 5"):
        frechet_distance(statistics, FeatureStatistics(5))


# --- Fréchet distance ------------------------------------------------------------------------------------------------

MEANS = (np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5]))
VARIANCES = (np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25]))
# |mu_a - mu_b|^2 + sum (std_a - std_b)^2 = (1 + 9 + 0) + (4 + 1 + 0)
CLOSED_FORM = 15.0


@pytest.mark.parametrize("turn", [np.eye(3), rotation(3)], ids=["diagonal", "full"])
def test_frechet_distance_of_gaussians(turn):
    """Covariances with common axes have a closed form, and a rotation of everything changes nothing."""
    a, b = (
        exact_statistics(turn @ mean, turn @ np.diag(variance) @ turn.T)
        for mean, variance in zip(MEANS, VARIANCES, strict=True)
    )
    assert frechet_distance(a, b) == pytest.approx(CLOSED_FORM, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(CLOSED_FORM, abs=1e-9)


def test_frechet_distance_without_common_axes():
    """2 x 2 covariances that do not commute: Tr (AB)^(1/2) = (Tr AB + 2 det(AB)^(1/2))^(1/2)."""
    cov_a, cov_b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    trace = math.sqrt(np.trace(cov_a @ cov_b) + 2 * math.sqrt(np.linalg.det(cov_a @ cov_b)))
    expected = 1.0 + 3.0 + 4.0 - 2 * trace
    a, b = exact_statistics(np.zeros(2), cov_a), exact_statistics(np.array([1.0, 0.0]), cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


def network_like(n: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated non-negative features with a falling spectrum."""
    mixing = np.random.default_rng(9).normal(size=(dim, dim)) / (1 + np.arange(dim))[:, None] ** 0.5
    return np.maximum(0.2 + shift + np.random.default_rng(seed).normal(size=(n, dim)) @ mixing, 0).astype(np.float32)


# A singular product's matrix square root, the references' way, is only good to the root of float64's precision.
@pytest.mark.parametrize("n, tolerance", [(600, 1e-6), (40, 1e-4)], ids=["full rank", "singular"])
@pytest.mark.parametrize("package", ["scipy", "cleanfid", "torch_fidelity"])
def test_frechet_distance_equals_the_reference_packages(package, n, tolerance):
    a, b = (FeatureStatistics.from_features(network_like(n, 64, seed, 0.1 * seed)) for seed in (0, 1))
    if package == "torch_fidelity":
        module = pytest.importorskip("torch_fidelity.metric_fid")
        moments = [{"mu": one.mean, "sigma": one.cov} for one in (a, b)]
        expected = module.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    elif package == "cleanfid":
        import cleanfid.fid

        expected = cleanfid.fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    else:
        from scipy.linalg import sqrtm

        cross = np.trace(np.real(sqrtm(a.cov @ b.cov)))
        expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("n", [12, 16, 17, 80], ids=["n < dim", "n = dim", "n = dim + 1", "n > dim"])
def test_frechet_estimate_is_the_distance_and_its_derivative(n):
    """The influence of a sample against central differences of the distance with that sample's weight changed."""
    real, samples = network_like(100, 16, 0), network_like(n, 16, 1, 0.3).astype(np.float64)
    reference = FeatureStatistics.from_features(real)
    statistics = FeatureStatistics.from_features(samples)
    found = frechet_estimate(samples, statistics, reference, covariance_factor(reference.cov))
    assert found.value == pytest.approx(frechet_distance(statistics, reference), rel=1e-9)

    def weighted(i: int, change: float) -> float:
        weights = np.ones(n)
        weights[i] += change
        weights *= n / weights.sum()
        mean = weights @ samples / n
        centred = samples - mean
        return frechet_distance(exact_statistics(mean, (centred.T * weights) @ centred / (n - 1), n), reference)

    step = 1e-3
    slopes = [(weighted(i, step) - weighted(i, -step)) / (2 * step) * n for i in range(n)]
    # Roots of eigenvalues near zero are good to about 1e-7, which the step divides.
    np.testing.assert_allclose(found.influence, slopes, rtol=5e-3, atol=5e-3 * np.abs(slopes).max())


@pytest.mark.parametrize("scale", [1.0, 0.3], ids=["like the reference", "narrower"])
def test_influences_on_a_frechet_distance_in_float32(scale, monkeypatch):
    real, samples = network_like(400, 64, 0), scale * network_like(300, 64, 1, 0.1)
    reference, statistics = (FeatureStatistics.from_features(one) for one in (real, samples))
    factor = covariance_factor(reference.cov)
    exact = frechet_estimate(samples, statistics, reference, factor)
    monkeypatch.setattr(frechet, "EXACT_PRODUCTS", 0)
    rough = frechet_estimate(samples, statistics, reference, factor)
    assert rough.value == exact.value
    np.testing.assert_allclose(rough.influence, exact.influence, atol=1e-4 * exact.influence.std())


@pytest.mark.parametrize("widest", [1.0, 1e3], ids=["a falling spectrum", "columns of many scales"])
@pytest.mark.parametrize("n", [350, 200], ids=["full rank", "singular"])
def test_small_eigenvalues_count(n, widest):
    """Against the sum of the singular values of F_a' F_b, which are not squared: no digits are lost."""
    dim = 256
    scales = widest / (1 + np.arange(dim)) ** (1.0 if widest == 1 else 3.0)
    mixing = np.random.default_rng(0).normal(size=(dim, dim)) / np.sqrt(dim) * scales[:, None]
    hidden = (gaussian(n, dim, seed).astype(np.float64) * (1 + 0.05 * seed) for seed in (0, 1))
    a, b = (np.maximum(0.3 + one @ mixing, 0) for one in hidden)
    deviations = [(x - x.mean(axis=0)) / np.sqrt(n - 1) for x in (a, b)]
    shift = a.mean(axis=0) - b.mean(axis=0)
    trace = np.linalg.svd(deviations[0] @ deviations[1].T, compute_uv=False).sum()
    expected = shift @ shift + sum((x**2).sum() for x in deviations) - 2 * trace
    found = frechet_distance(*(FeatureStatistics.from_features(x) for x in (a, b)))
    # A singular covariance has no Cholesky factor, and its eigenvectors keep fewer digits.
    assert found == pytest.approx(expected, rel=1e-7 if n > dim else 1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_an_offset_costs_no_digits(offset):
    a, b = (gaussian(3000, 8, seed, scale=1 + 0.1 * seed).astype(np.float64) for seed in (0, 1))
    found = frechet_distance(*(FeatureStatistics.from_features(x + offset) for x in (a, b)))
    assert found == pytest.approx(frechet_distance(*(FeatureStatistics.from_features(x) for x in (a, b))), rel=1e-7)


@pytest.mark.parametrize("n", [40, 10], ids=["full rank", "singular"])
def test_covariance_factor(n):
    cov = np.cov(gaussian(n, 16), rowvar=False)
    factor = covariance_factor(cov)
    np.testing.assert_allclose(factor @ factor.T, cov, atol=1e-12)


@pytest.mark.parametrize("n, tolerance", [(200, 1e-9), (6, 1e-5)], ids=["full rank", "singular"])
def test_frechet_distance_of_a_set_to_itself_is_zero(n, tolerance):
    statistics = FeatureStatistics.from_features(gaussian(n, 16))
    assert abs(frechet_distance(statistics, statistics)) < tolerance


# --- names, warnings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extractor, names",
    [
        ("inception", ("fid", "cfid", "kid", "ckid")),
        ("torcheval", ("fid_torcheval", "cfid_torcheval", "kid_torcheval", "ckid_torcheval")),
        ("judge", ("fd_judge", "cfd_judge", "kd_judge", "ckd_judge")),
        ("dinov2", ("fd_dinov2", "cfd_dinov2", "kd_dinov2", "ckd_dinov2")),
        ("inception_v4", ("fd_inception_v4", "cfd_inception_v4", "kd_inception_v4", "ckd_inception_v4")),
    ],
)
def test_only_inception_features_are_called_fid(extractor, names):
    assert metric_names(extractor) == names


@pytest.mark.parametrize("name", ["", "Inception", "my net", "a,b", "7b"])
def test_names_that_are_no_column_names(name):
    with pytest.raises(ValueError, match="lower-case"):
        metric_names(name)


@pytest.mark.parametrize("n, warns", [(2047, True), (2048, True), (2049, False), (0, True)])
def test_rank_warning(n, warns):
    message = rank_warning(n, 2048)
    assert (message is not None) == warns
    if warns:
        assert f"{n} samples" in message and f"rank {max(n - 1, 0)}" in message


def test_rank_warning_tells_the_truth():
    features = gaussian(5, 5)
    assert np.linalg.matrix_rank(np.cov(features, rowvar=False)) == 4
    assert np.linalg.matrix_rank(np.cov(gaussian(6, 5), rowvar=False)) == 5


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logits, target, expected",
    [
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 4.0, 1.0], [0.0, 0.0, 9.0]], 0, 0.5),
        ([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 4.0, 1.0], [0.0, 0.0, 9.0]], 2, 0.25),
        ([[0.3], [-0.2], [4.0], [1.0]], 1, 0.75),
        ([[0.3], [-0.2], [4.0], [1.0]], 0, 0.25),
    ],
)
def test_target_share(logits, target, expected):
    assert target_share(np.array(logits, dtype=np.float32), target) == expected


@pytest.mark.parametrize(
    "logits, target, error",
    [
        (np.zeros((0, 3)), 0, ValueError),
        (np.zeros(3), 0, ValueError),
        (np.zeros((2, 3)), 3, ValueError),
        (np.zeros((2, 3)), -1, ValueError),
        (np.zeros((2, 1)), 2, ValueError),
        (np.full((2, 3), np.nan), 0, DataError),
    ],
)
def test_target_share_refuses(logits, target, error):
    with pytest.raises(error):
        target_share(logits, target)


@pytest.mark.parametrize(
    "logits, labels, bins, expected",
    [
        # Confidences 0.75 (right) and 0.75 (wrong) share a bin: accuracy 0.5, confidence 0.75.
        ([[math.log(3), 0.0], [math.log(3), 0.0]], [0, 1], 10, 0.25),
        # 0.5 and 0.9 in bins of their own: half of |1 - 0.5| + |0 - 0.9|.
        ([[0.0, 0.0], [math.log(9), 0.0]], [0, 1], 10, 0.7),
        # The same in one bin: |(1 + 0) / 2 - 0.7|.
        ([[0.0, 0.0], [math.log(9), 0.0]], [0, 1], 1, 0.2),
        # One logit: p(1) = 0.9, right.
        ([[math.log(9)]], [1], 15, 0.1),
        ([[100.0, 0.0], [0.0, 100.0]], [0, 1], 15, 0.0),
    ],
)
def test_calibration_error(logits, labels, bins, expected):
    assert calibration_error(np.array(logits), np.array(labels), bins) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_refuses_other_labels():
    with pytest.raises(ValueError, match="labels of shape"):
        calibration_error(np.zeros((3, 2)), np.zeros(2, int))
