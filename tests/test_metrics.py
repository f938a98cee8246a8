"""Metrics against closed forms, brute force and the direction that an effect must have."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg import metrics
from nrcg.errors import DataError
from nrcg.metrics import (
    FeatureStatistics,
    evaluate_samples,
    frechet_distance,
    kernel_distance,
    metric_names,
    precision_recall,
    rank_warning,
    target_share,
    wilson_interval,
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
    statistics.total = n * np.asarray(mean, float)
    statistics.outer = (n - 1) * np.asarray(cov, float) + n * np.outer(mean, mean)
    return statistics


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_equal_numpys(monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", 7)  # several blocks
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
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-12, atol=1e-12)


def test_merge_leaves_the_other_alone():
    a, b = (FeatureStatistics.from_features(gaussian(5, seed=seed)) for seed in (0, 1))
    before = b.outer.copy()
    a.merge(b)
    a.update(gaussian(5))
    assert b.n == 5
    np.testing.assert_array_equal(b.outer, before)


def test_save_and_load(tmp_path):
    statistics = FeatureStatistics.from_features(gaussian(9))
    statistics.save(tmp_path / "statistics.npz")
    loaded = FeatureStatistics.load(tmp_path / "statistics.npz")
    assert loaded.n == 9
    np.testing.assert_array_equal(loaded.total, statistics.total)
    np.testing.assert_array_equal(loaded.outer, statistics.outer)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut off", "other keys", "shapes", "pickle", "npy"])
def test_load_refuses_other_files(kind, tmp_path):
    path = tmp_path / "statistics.npz"
    square = {"n": np.int64(2), "total": np.zeros(2), "outer": np.zeros((2, 2))}
    if kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "no archive")
    elif kind == "cut off":
        FeatureStatistics.from_features(gaussian(9)).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind != "missing":
        changed = {
            "other keys": {"mu": np.zeros(2)},
            "shapes": square | {"outer": np.zeros((2, 3))},
            "pickle": square | {"total": np.array([{}, {}], dtype=object)},
        }
        np.savez(path, **changed[kind])
    with pytest.raises(DataError, match=r"statistics\.npz holds no feature statistics"):
        FeatureStatistics.load(path)


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


def clean_fid_raises(error: Exception):
    def fails(*moments):
        raise error

    return fails


@pytest.mark.parametrize("failure", [None, TypeError("disp"), ValueError("Imaginary component 1.0")])
@pytest.mark.parametrize("turn", [np.eye(3), rotation(3)], ids=["diagonal", "full"])
def test_frechet_distance_of_gaussians(turn, failure, monkeypatch, caplog):
    """Covariances with common axes have a closed form, and a rotation of everything changes nothing."""
    if failure is not None:
        monkeypatch.setattr("cleanfid.fid.frechet_distance", clean_fid_raises(failure))
    a, b = (
        exact_statistics(turn @ mean, turn @ np.diag(variance) @ turn.T)
        for mean, variance in zip(MEANS, VARIANCES, strict=True)
    )
    assert frechet_distance(a, b) == pytest.approx(CLOSED_FORM, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(CLOSED_FORM, abs=1e-9)
    assert ("symmetric eigenvalue form" in caplog.text) == (failure is not None)


def test_frechet_distance_without_common_axes():
    """2 x 2 covariances that do not commute: Tr (AB)^(1/2) = (Tr AB + 2 det(AB)^(1/2))^(1/2)."""
    cov_a, cov_b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    trace = math.sqrt(np.trace(cov_a @ cov_b) + 2 * math.sqrt(np.linalg.det(cov_a @ cov_b)))
    expected = 1.0 + 3.0 + 4.0 - 2 * trace
    a, b = exact_statistics(np.zeros(2), cov_a), exact_statistics(np.array([1.0, 0.0]), cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [200, 6], ids=["full rank", "singular"])
def test_both_forms_of_the_frechet_distance_agree(n):
    a, b = (FeatureStatistics.from_features(gaussian(n, 16, seed)) for seed in (0, 1))
    expected = metrics._symmetric_frechet_distance(a.mean, a.cov, b.mean, b.cov)
    # A singular product's square root is only good to the root of float64's precision.
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10 if n > 16 else 1e-5)


@pytest.mark.parametrize("n, tolerance", [(200, 1e-9), (6, 1e-5)], ids=["full rank", "singular"])
def test_frechet_distance_of_a_set_to_itself_is_zero(n, tolerance):
    statistics = FeatureStatistics.from_features(gaussian(n, 16))
    assert abs(frechet_distance(statistics, statistics)) < tolerance


# --- direction of effect ---------------------------------------------------------------------------------------------

DAMAGE = {
    "shift": lambda x: x + 1.0,
    "noise": lambda x: x + 2 * np.random.default_rng(5).normal(size=x.shape).astype(np.float32),
    "dropped mode": lambda x: x[: len(x) // 2],
    "collapse": lambda x: np.repeat(x[:10], len(x) // 10, axis=0),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_damage_raises_both_distances(distance, damage):
    def measure(a, b):
        if distance == "kernel":
            return kernel_distance(a, b)
        return frechet_distance(FeatureStatistics.from_features(a), FeatureStatistics.from_features(b))

    reference, fresh = (two_modes(150, seed, centre=2.0) for seed in (0, 1))
    assert measure(DAMAGE[damage](fresh), reference) > measure(fresh, reference) + 1.0


# --- kernel distance -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_subsets(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 50)


@pytest.mark.usefixtures("small_subsets")
def test_kernel_distance_is_deterministic_given_the_seed():
    a, b = gaussian(120), gaussian(90, seed=1)
    first = kernel_distance(a, b, seed=3)
    np.random.seed(99)  # noqa: NPY002 - the generator that clean-fid uses
    assert kernel_distance(a, b, seed=3) == first
    assert kernel_distance(a, b, seed=4) != first


@pytest.mark.parametrize("feats_b", [gaussian(90, seed=1), np.full((90, 4), "x")], ids=["success", "failure"])
def test_kernel_distance_leaves_the_global_random_state_alone(feats_b):
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    try:
        kernel_distance(gaussian(120), feats_b, seed=3)
    except ValueError:
        assert feats_b.dtype.kind == "U"
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of Binkowski et al. 2018, term by term."""
    kernel = lambda u, v: (float(u @ v) / len(u) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(u, v) for u in x for v in y) / (n * m)
    return within_x + within_y - 2 * across


@pytest.mark.parametrize("n", [2, 12])
def test_kernel_distance_of_equal_sizes_is_the_unbiased_estimate(n):
    a, b = gaussian(n).astype(np.float64), gaussian(n, seed=1, shift=0.5).astype(np.float64)
    assert kernel_distance(a, b) == pytest.approx(unbiased_mmd(a, b), rel=1e-9)


def test_one_subset_stands_for_all_when_there_is_nothing_to_draw():
    """The shortcut for equal sizes: clean-fid's 100 subsets would all be the whole set."""
    from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

    a, b = gaussian(30).astype(np.float64), gaussian(30, seed=1).astype(np.float64)
    assert kernel_distance(a, b) == pytest.approx(cleanfid_kernel_distance(a, b), rel=1e-9)


def test_kernel_distance_of_one_distribution_is_about_zero():
    # Unbiased, so it scatters around zero; over seeds its standard deviation is about 0.02 at this size.
    values = [kernel_distance(gaussian(300, seed=2 * i), gaussian(300, seed=2 * i + 1)) for i in range(8)]
    assert abs(np.mean(values)) < 0.03
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize(
    "a, b, error", [(1, 5, DataError), (5, 1, DataError), (0, 5, DataError), (5, None, ValueError)]
)
def test_kernel_distance_refuses(a, b, error):
    feats_b = np.zeros((5, 3)) if b is None else gaussian(b)
    with pytest.raises(error):
        kernel_distance(gaussian(a), feats_b)


# --- precision and recall --------------------------------------------------------------------------------------------


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def share_inside(points, manifold):
        inside = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = sorted(((centre - other) ** 2).sum() for j, other in enumerate(manifold) if j != i)
                if ((point - centre) ** 2).sum() <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share_inside(samples, reference), share_inside(reference, samples)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    k=st.integers(1, 4),
    block_size=st.integers(1, 16),
)
def test_precision_recall_equals_brute_force(seed, sizes, k, block_size):
    """Points of a small grid, so that ties and duplicates occur; their squared distances are exact integers."""
    rng = np.random.default_rng(seed)
    reference, samples = (rng.integers(0, 5, (n, 2)).astype(np.float64) for n in sizes)
    samples = samples + rng.integers(0, 4)
    assert precision_recall(reference, samples, k, block_size=block_size) == brute_force(reference, samples, k)


@pytest.mark.parametrize(
    "samples, expected",
    [
        (two_modes(20), (1.0, 1.0)),
        (two_modes(20) + 1000, (0.0, 0.0)),
        (two_modes(20)[:20], (1.0, 0.5)),
        (np.concatenate([two_modes(20), two_modes(20) + 1000]), (0.5, 1.0)),
        (np.repeat(two_modes(20)[:1], 10, axis=0), (1.0, 1 / 40)),
    ],
    ids=["identical", "disjoint", "dropped mode", "invented mode", "copies of one image"],
)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_precision_recall_of_known_cases(samples, expected, offset):
    """The offset costs digits in |a|^2 + |b|^2 - 2ab: equal points must still count as equal."""
    assert precision_recall(two_modes(20) + offset, samples + offset, block_size=7) == expected


def test_precision_recall_swaps_with_its_arguments():
    a, b = gaussian(60), gaussian(80, seed=1, scale=2.0)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]


@pytest.mark.parametrize(
    "reference, samples, k, error",
    [(3, 10, 3, DataError), (10, 3, 3, DataError), (10, 10, 0, ValueError), (10, None, 3, ValueError)],
)
def test_precision_recall_refuses(reference, samples, k, error):
    with pytest.raises(error):
        precision_recall(gaussian(reference), np.zeros((10, 3)) if samples is None else gaussian(samples), k)


# --- names, warnings, the whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extractor, names",
    [
        ("inception", ("fid", "cfid", "kid", "ckid")),
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


def test_evaluate_samples_compares_with_all_and_with_the_target_class():
    """Samples that are the target class's references: no distance to it, some to the whole."""
    reference, labels = two_modes(40), np.repeat([0, 1], 40)
    samples = reference[labels == 1]
    result = evaluate_samples(samples, reference, labels, target=1, name="judge", seed=0)
    assert list(result) == ["fd_judge", "cfd_judge", "kd_judge", "ckd_judge", "precision", "recall"]
    assert all(type(value) is float for value in result.values())
    assert abs(result["cfd_judge"]) < 1e-6 and result["fd_judge"] > 100
    assert result["ckd_judge"] < 0.1 * result["kd_judge"]
    assert (result["precision"], result["recall"]) == (1.0, 1.0)
    other = evaluate_samples(samples, reference, labels, target=0, name="inception", seed=0)
    assert other["cfid"] > 100 and other["fid"] == pytest.approx(result["fd_judge"])
    assert (other["precision"], other["recall"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "labels, target, error, text",
    [
        (np.zeros(10, int), 2, DataError, "no image of the target class 2"),
        (np.zeros(9, int), 0, ValueError, "10 reference features but labels of shape"),
        (np.arange(10), 3, DataError, "got 1 reference images"),
    ],
)
def test_evaluate_samples_refuses(labels, target, error, text):
    with pytest.raises(error, match=text):
        evaluate_samples(gaussian(10), gaussian(10, seed=1), labels, target, "judge", 0)


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
    "successes, n, expected",
    [
        # z^2 = 3.8416: at 0 of 10 high = 3.8416 / 13.8416; at 5 of 10 half = 1.96 * 0.185996 / 1.38416.
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Stat. Med. 17, table I
    ],
)
def test_wilson_interval(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10**5), share=st.floats(0, 1), z=st.floats(0.1, 5))
def test_wilson_interval_bounds_solve_its_equation(n, share, z):
    """Each bound p is where |successes / n - p| = z * sqrt(p (1 - p) / n)."""
    successes = round(share * n)
    low, high = wilson_interval(successes, n, z)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    for bound in (low, high):
        assert (successes / n - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-9)


@pytest.mark.parametrize("successes, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)
