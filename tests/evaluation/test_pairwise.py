"""Pairwise metrics against brute force, the reference packages, and the direction that an effect must have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg.errors import DataError
from nrcg.evaluation import blocks, pairwise
from nrcg.evaluation.frechet import FeatureStatistics, frechet_distance
from nrcg.evaluation.pairwise import (
    across,
    density_coverage,
    kernel_distance,
    kernel_estimate,
    mean_pair_distance,
    neighbour_estimates,
    precision_recall,
    within,
)


def gaussian(n: int, dim: int = 4, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return (shift + scale * np.random.default_rng(seed).normal(size=(n, dim))).astype(np.float32)


def two_modes(n: int, seed: int = 0, centre: float = 10.0) -> np.ndarray:
    """(2n, 4): n points around -centre and n around +centre in every dimension."""
    return np.concatenate([gaussian(n, 4, seed, -centre), gaussian(n, 4, seed + 1000, centre)])


@pytest.fixture(params=["one float64 block", "float64 blocks", "float32 blocks"])
def products(request, monkeypatch):
    """Every way that the products are computed."""
    if request.param != "one float64 block":
        monkeypatch.setattr(blocks, "BLOCK", 7)
    if request.param == "float32 blocks":
        monkeypatch.setattr(blocks, "EXACT_PAIRS", 0)
    return request.param


# --- against brute force ---------------------------------------------------------------------------------------------


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> dict[str, float]:
    """The definitions, point by point: squared distances are exact for integers."""
    square = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=2)  # noqa: E731

    def radii(points):
        others = square(points, points).astype(float)
        np.fill_diagonal(others, np.inf)
        return np.sort(others, axis=1)[:, k - 1]

    between = square(samples, reference)
    real, fake = radii(reference), radii(samples)
    return {
        "precision": (between <= real).any(axis=1).mean(),
        "recall": (fake >= between.T).any(axis=1).mean(),
        "density": (between < real).sum() / (k * len(samples)),
        "coverage": (between.min(axis=0) < real).mean(),
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    k=st.integers(1, 4),
    block=st.integers(1, 16),
    exact=st.booleans(),
)
def test_neighbours_equal_brute_force(seed, sizes, k, block, exact):
    """Points of a small grid, so that ties and duplicates occur."""
    rng = np.random.default_rng(seed)
    reference, samples = (rng.integers(0, 5, (n, 2)).astype(np.float64) for n in sizes)
    samples = samples + rng.integers(0, 4)
    expected = brute_force(reference, samples, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        patch.setattr(blocks, "EXACT_PAIRS", 2**22 if exact else 0)
        found = (*precision_recall(reference, samples, k), *density_coverage(reference, samples, k))
    assert found == pytest.approx(tuple(expected.values()), abs=1e-12)


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of Binkowski et al. 2018, term by term."""
    kernel = lambda u, v: (float(u @ v) / len(u) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across_both = sum(kernel(u, v) for u in x for v in y) / (n * m)
    return within_x + within_y - 2 * across_both


@pytest.mark.parametrize("sizes", [(2, 2), (12, 12), (9, 20)])
def test_kernel_distance_is_the_unbiased_estimate(sizes, products):
    a, b = gaussian(sizes[0], shift=3.0).astype(np.float64), gaussian(sizes[1], seed=1, shift=3.5).astype(np.float64)
    # Values of several hundred, from kernels of about 1e4 with float32's seven digits.
    tolerance = {"rel": 1e-4} if products == "float32 blocks" else {"rel": 1e-9}
    assert kernel_distance(a, b) == pytest.approx(unbiased_mmd(a, b), **tolerance)


def test_mean_pair_distance_of_chosen_points(products):
    points = gaussian(20)
    chosen = np.arange(20) % 3 == 0
    some = points[chosen]
    pairs = [np.linalg.norm(some[i] - some[j]) for i in range(len(some)) for j in range(i)]
    found = mean_pair_distance(within(points, chosen=chosen), chosen)
    assert found.value == pytest.approx(np.mean(pairs), rel=1e-5)
    assert np.isnan(mean_pair_distance(within(points, chosen=chosen & (np.arange(20) < 1)), chosen[:1]).value)


@pytest.mark.parametrize("metric", ["kernel", "recall", "coverage", "distance"])
def test_influence_is_what_leaving_a_sample_out_changes(metric, monkeypatch):
    """(n - 1) times the change, every sample left out in turn; the balls of the other samples stay as they were."""
    reference, samples = gaussian(30), gaussian(12, seed=1, scale=1.5)
    real, own = within(reference), within(samples)

    def estimate(kept: np.ndarray):
        pairs = within(samples[kept])
        if metric in ("recall", "coverage"):
            pairs = pairwise.Within(own.nearest[kept], own.kernel[kept], own.distance[kept])
        if metric == "distance":
            return mean_pair_distance(pairs)
        between = across(samples[kept], reference, pairs, real)
        if metric == "kernel":
            return kernel_estimate(pairs, real, between)
        return neighbour_estimates(real, between)[metric]

    everything = np.arange(12)
    whole = estimate(everything)
    changes = [11 * (whole.value - estimate(np.delete(everything, i)).value) for i in range(12)]
    np.testing.assert_allclose(whole.influence, changes, atol=1e-9 * max(1, np.abs(changes).max()))


# --- against the reference packages ----------------------------------------------------------------------------------


def test_parity_with_prdc():
    prdc = pytest.importorskip("prdc")
    reference, samples = gaussian(400, 32), gaussian(300, 32, seed=1, scale=1.1)
    theirs = prdc.compute_prdc(reference, samples, nearest_k=5)
    ours = (*precision_recall(reference, samples, 5), *density_coverage(reference, samples, 5))
    # prdc rounds distances to float32, which may move a pair over the edge of a ball.
    assert ours == pytest.approx([theirs[name] for name in ("precision", "recall", "density", "coverage")], abs=4e-3)


def test_parity_with_torch_fidelity():
    torch = pytest.importorskip("torch")
    prc, kid = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("prc", "kid"))
    reference, samples = gaussian(400, 32), gaussian(300, 32, seed=1, scale=1.1)
    tensors = torch.from_numpy(samples), torch.from_numpy(reference)
    theirs = prc.prc_features_to_metric(*tensors, prc_neighborhood=3, verbose=False)
    assert precision_recall(reference, samples, 3) == pytest.approx((theirs["precision"], theirs["recall"]), abs=4e-3)
    subsets = kid.kid_features_to_metric(*tensors, kid_subsets=200, kid_subset_size=250, verbose=False)
    error = subsets["kernel_inception_distance_std"] / 200**0.5
    # Subsets of 250 out of 300 overlap: their mean is close to the value over all pairs.
    assert kernel_distance(samples, reference) == pytest.approx(
        subsets["kernel_inception_distance_mean"], abs=4 * error
    )


def test_parity_with_clean_fid():
    from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

    a, b = gaussian(200, 32).astype(np.float64), gaussian(200, 32, seed=1, shift=0.3).astype(np.float64)
    # Subsets as large as the sets: clean-fid's random choice is a permutation, so the values are equal.
    assert kernel_distance(a, b) == pytest.approx(cleanfid_kernel_distance(a, b, num_subsets=1), rel=1e-9)
    # Smaller subsets: their mean scatters around it by about 1 % at 2,000 subsets.
    assert kernel_distance(a, b) == pytest.approx(cleanfid_kernel_distance(a, b, 2000, 100), rel=0.05)


# --- direction of effect ---------------------------------------------------------------------------------------------


def frechet(samples: np.ndarray, reference: np.ndarray) -> float:
    return frechet_distance(FeatureStatistics.from_features(samples), FeatureStatistics.from_features(reference))


def spread(samples: np.ndarray, _: np.ndarray) -> float:
    return mean_pair_distance(within(samples)).value


MEASURES = {
    "frechet": frechet,
    "kernel": kernel_distance,
    "precision": lambda s, r: precision_recall(r, s)[0],
    "recall": lambda s, r: precision_recall(r, s)[1],
    "density": lambda s, r: density_coverage(r, s)[0],
    "coverage": lambda s, r: density_coverage(r, s)[1],
    "diversity": spread,
}
DAMAGES = {
    "shift": lambda x: x + 2.0,
    "noise": lambda x: x + 2 * np.random.default_rng(5).normal(size=x.shape).astype(np.float32),
    "dropped mode": lambda x: x[: len(x) // 2],
    "copies": lambda x: np.repeat(x[:: len(x) // 10], 10, axis=0),
    "blur": lambda x: np.sign(x) * 2 + (x - np.sign(x) * 2) * 0.2,  # each mode shrinks to its middle
}
# damage -> measure -> the sign of the change
EFFECTS = {
    "shift": {"frechet": 1, "kernel": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1},
    "noise": {"frechet": 1, "kernel": 1, "precision": -1, "density": -1, "coverage": -1, "diversity": 1},
    "dropped mode": {"frechet": 1, "kernel": 1, "recall": -1, "coverage": -1, "diversity": -1},
    "copies": {"recall": -1, "coverage": -1},
    "blur": {"frechet": 1, "recall": -1, "coverage": -1, "density": 1, "diversity": -1},
}


@pytest.mark.parametrize("damage, measure", [(damage, name) for damage in EFFECTS for name in EFFECTS[damage]])
def test_a_damage_moves_a_measure_the_right_way(damage, measure):
    reference, fresh = (two_modes(150, seed, centre=2.0) for seed in (0, 1))
    before, after = (MEASURES[measure](samples, reference) for samples in (fresh, DAMAGES[damage](fresh)))
    assert EFFECTS[damage][measure] * (after - before) > 0.03 * abs(before)


@pytest.mark.parametrize(
    "samples, expected",
    [
        (two_modes(20), (1.0, 1.0, 1.0, 1.0)),
        (two_modes(20) + 1000, (0.0, 0.0, 0.0, 0.0)),
        (two_modes(20)[:20], (1.0, 0.5, 1.0, 0.5)),
        (np.concatenate([two_modes(20), two_modes(20) + 1000]), (0.5, 1.0, 0.5, 1.0)),
    ],
    ids=["identical", "disjoint", "dropped mode", "invented mode"],
)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_known_cases(samples, expected, offset, products):
    """Every ball of k = 5 holds its centre and 4 others, so density is 1 for equal sets."""
    reference = two_modes(20) + offset
    found = (*precision_recall(reference, samples + offset), *density_coverage(reference, samples + offset))
    dense = len(samples) == 20  # the mean over one mode's points of how often they are someone's neighbour
    assert found == pytest.approx(expected, abs=0.0 if not dense else 1e-12)


def test_kernel_distance_of_one_distribution_is_about_zero():
    # Unbiased, so it scatters around zero; over seeds its standard deviation is about 0.02 at this size.
    values = [kernel_distance(gaussian(300, seed=2 * i), gaussian(300, seed=2 * i + 1)) for i in range(8)]
    assert abs(np.mean(values)) < 0.03
    assert min(values) < 0 < max(values)


def test_copies_of_one_image_are_no_diversity():
    samples = np.repeat(two_modes(20)[:1], 10, axis=0)
    assert precision_recall(two_modes(20), samples) == (1.0, 1 / 40)
    assert mean_pair_distance(within(samples)).value == pytest.approx(0, abs=1e-5)


def test_off_manifold_counts_what_no_image_is_near_to():
    reference = gaussian(500)
    real = within(reference)
    samples = np.concatenate([gaussian(30, seed=1), gaussian(10, seed=2, shift=50)])
    found = neighbour_estimates(real, across(samples, reference, within(samples), real))
    assert 0.25 <= found["off_manifold"].value <= 0.3


# --- memory and mistakes ---------------------------------------------------------------------------------------------


def test_blocks_and_types_change_nothing_but_rounding(monkeypatch):
    reference, samples = gaussian(300, 16), gaussian(200, 16, seed=1, scale=1.2)
    real, own = within(reference), within(samples)
    exact = across(samples, reference, own, real)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "EXACT_PAIRS", 0)
    real, own = within(reference), within(samples)
    rough = across(samples, reference, own, real)
    for name in exact.__dataclass_fields__:
        np.testing.assert_allclose(getattr(rough, name), getattr(exact, name), rtol=1e-5, err_msg=name)


def far_apart(n: int, dim: int, centre: float, scale: float, seed: int) -> np.ndarray:
    """Two clusters whose distance is large against their width."""
    points = gaussian(n, dim, seed, scale=scale)
    points[::2] += centre
    points[1::2] -= centre
    return points


def with_outlier(points: np.ndarray, value: float) -> np.ndarray:
    points = points.copy()
    points[3] = value
    return points


HARD = {
    "plain": (gaussian(230, 24), gaussian(210, 24, 1, scale=1.1)),
    "copies": (gaussian(400, 16), gaussian(400, 16)[:100]),
    "copies, one more": (gaussian(230, 24), np.concatenate([gaussian(230, 24)[::-1], gaussian(1, 24, 5)])),
    "duplicates": (np.repeat(gaussian(120, 8), 2, axis=0), np.repeat(gaussian(110, 8, 1), 2, axis=0)),
    "one value": (np.ones((210, 4), np.float32), np.ones((220, 4), np.float32)),
    "offset": (gaussian(230, 24, shift=100), gaussian(210, 24, 1, shift=100)),
    "tight clusters": (far_apart(220, 64, 10, 0.01, 0), far_apart(210, 64, 10, 0.01, 1)),
    "clusters": (far_apart(220, 64, 100, 1, 0), far_apart(210, 64, 100, 1, 1)),
    "an outlier": (with_outlier(gaussian(220, 64), 1e5), gaussian(210, 64, 1)),
    "an outlying sample": (gaussian(220, 64), with_outlier(gaussian(210, 64, 1), 1e5)),
    "few samples": (gaussian(2000, 4), gaussian(22, 4, 1)),
    "large": (gaussian(220, 24, scale=3e12), gaussian(210, 24, 1, scale=3e12)),
    "small": (gaussian(220, 24, scale=1e-6), gaussian(210, 24, 1, scale=1e-6)),
    "few dimensions": (gaussian(220, 1), gaussian(210, 1, 1)),
}


@pytest.mark.parametrize("name", HARD)
def test_many_pairs_give_what_float64_gives(name, monkeypatch):
    """Where float32 is not enough, as for clusters that are tight against their distance, and for ties."""
    reference, samples = HARD[name]
    monkeypatch.setattr(blocks, "BLOCK", 100)
    parts = []
    for pairs in (40_000, 2**40):
        monkeypatch.setattr(blocks, "EXACT_PAIRS", pairs)
        real, own = within(reference), within(samples)
        parts.append((real, own, across(samples, reference, own, real)))
    (real, own, between), (exact_real, exact_own, exact) = parts
    for counts in ("inside", "dense", "recalled", "covered", "recalled_by", "covered_by"):
        np.testing.assert_array_equal(getattr(between, counts), getattr(exact, counts), err_msg=counts)
    for found, wanted in ((real, exact_real), (own, exact_own)):
        scale = np.square(reference.astype(np.float64) - reference.mean(axis=0, dtype=np.float64)).sum(axis=1).mean()
        np.testing.assert_allclose(found.nearest, wanted.nearest, rtol=1e-9, atol=1e-12 * scale)
        np.testing.assert_allclose(found.distance, wanted.distance, rtol=1e-5)
    kid, exact_kid = kernel_estimate(own, real, between), kernel_estimate(exact_own, exact_real, exact)
    # Each side's kernel has its own spread, of which float32 keeps six digits.
    spread = np.std(exact_own.kernel / (len(samples) - 1)) + np.std(exact_real.kernel / (len(reference) - 1))
    assert kid.value == pytest.approx(exact_kid.value, rel=1e-4, abs=1e-5 * spread)
    np.testing.assert_allclose(kid.influence, exact_kid.influence, atol=1e-4 * np.std(exact_kid.influence) + 1e-300)


@pytest.mark.parametrize("shape", [(32, 64), (33, 64), (64, 50), (16, 17), (128, 128), (5, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_smallest_of_rows_and_columns(shape, ties):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, shape).astype(np.float32) if ties else rng.random(shape, np.float32)
    for k in (1, 3, 5):
        for found, sorts in (
            (blocks.smallest(torch.from_numpy(values), k), values),
            (blocks.smallest_in_columns(torch.from_numpy(values), k), values.T),
        ):
            smallest, places = (tensor.numpy() for tensor in found)
            np.testing.assert_array_equal(smallest, np.sort(sorts, axis=1)[:, :k])
            np.testing.assert_array_equal(np.take_along_axis(sorts, places, axis=1), smallest)
            assert all(len(set(row)) == len(row) for row in places.tolist())


def test_memory_mapped_features_are_read_in_blocks(tmp_path, monkeypatch):
    features = gaussian(100)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    monkeypatch.setattr(blocks, "BLOCK", 32)
    np.testing.assert_array_equal(within(mapped).kernel, within(features).kernel)


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
@pytest.mark.parametrize(
    "reference, samples, k, error",
    [(3, 10, 3, DataError), (10, 3, 3, DataError), (10, 10, 0, ValueError), (10, None, 3, ValueError)],
)
def test_neighbours_refuse(measure, reference, samples, k, error):
    with pytest.raises(error):
        measure(gaussian(reference), np.zeros((10, 3)) if samples is None else gaussian(samples), k)


@pytest.mark.parametrize(
    "a, b, error",
    [(1, 5, DataError), (5, 1, DataError), (0, 5, DataError), (5, None, ValueError), (5, np.nan, DataError)],
)
def test_kernel_distance_refuses(a, b, error):
    other = {None: np.zeros((5, 3))}.get(b) if b is None else (np.full((5, 4), b) if b != b else gaussian(b))
    with pytest.raises(error):
        kernel_distance(gaussian(a), other)
