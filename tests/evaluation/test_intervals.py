"""Intervals: closed forms, determinism, and how often they cover a known truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg.evaluation.frechet import FeatureStatistics, covariance_factor, frechet_estimate
from nrcg.evaluation.intervals import Estimate, bootstrap_intervals, mean, share_difference, supported, wilson_interval
from nrcg.evaluation.pairwise import across, kernel_estimate, mean_pair_distance, neighbour_estimates, within


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
    assert wilson_interval(successes, n, 1.96) == pytest.approx(expected, abs=5e-5)


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


@pytest.mark.parametrize(
    "only_first, only_second, both, n, expected",
    [
        # n + 2 = 12, (0.5 - 0.5) / 12 +- 1.959964 * 1 / 12
        (0, 0, 5, 10, (-0.163330, 0.163330)),
        # 3.5 - 0.5 = 3 of 12: 0.25 +- 1.959964 * sqrt(4 - 9 / 12) / 12
        (3, 0, 2, 10, (-0.044447, 0.544447)),
    ],
)
def test_share_difference(only_first, only_second, both, n, expected):
    first = np.arange(n) < only_first + both
    second = (np.arange(n) >= only_first) & (np.arange(n) < only_first + both + only_second)
    found = share_difference(first, second)
    assert found.value == pytest.approx((only_first - only_second) / n)
    assert found.interval == pytest.approx(expected, abs=1e-6)


def test_bootstrap_of_a_mean_is_that_of_the_resampled_mean():
    """Against numpy's own resampling: both bounds within the scatter of 1,000 replicates."""
    values = np.random.default_rng(0).gamma(1.0, size=200)
    low, high = bootstrap_intervals({"a": mean(values)})["a"]
    rng = np.random.default_rng(1)
    expected = np.quantile(values[rng.integers(200, size=(4000, 200))].mean(axis=1), [0.025, 0.975])
    # A 2.5 % quantile of 1,000 replicates scatters by about 0.1 standard errors.
    assert (low, high) == pytest.approx(expected, abs=0.3 * values.std() / 200**0.5)


def test_bootstrap_is_deterministic_and_shares_its_draws():
    values = np.random.default_rng(0).normal(size=50)
    estimates = {"a": mean(values), "twice": mean(2 * values)}
    found = bootstrap_intervals(estimates, seed=3)
    assert found == bootstrap_intervals(estimates, seed=3)
    assert found != bootstrap_intervals(estimates, seed=4)
    assert found["twice"] == pytest.approx([2 * bound for bound in found["a"]])
    assert list(found) == ["a", "twice"]


@pytest.mark.parametrize(
    "estimate, expected",
    [
        (Estimate(0.5, interval=(0.4, 0.6)), (0.4, 0.6)),
        (Estimate(float("nan"), np.ones(3)), (np.nan, np.nan)),
        (Estimate(1.0), (np.nan, np.nan)),
        (Estimate(0.9, np.zeros(10), 0.0, 1.0, also=(0.7, 0.95)), (0.7, 0.95)),
        (Estimate(0.0, np.array([-100.0, 100.0] * 9), low=0.0, high=0.0), (0.0, 0.0)),
    ],
)
def test_bootstrap_of_special_estimates(estimate, expected):
    assert bootstrap_intervals({"a": estimate})["a"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((1.0, (0.0, 2.0)), (2.4, (1.4, 3.4)), False),  # 1.4 < sqrt(2)
        ((1.0, (0.0, 2.0)), (2.5, (1.5, 3.5)), True),
        ((1.0, (-9.0, 1.1)), (1.5, (1.3, 99.0)), True),  # only the sides that face each other count
        ((1.0, (1.0, 1.0)), (1.0, (1.0, 1.0)), False),
        ((1.0, (np.nan, np.nan)), (5.0, (4.0, 6.0)), False),
    ],
)
def test_supported(a, b, expected):
    assert supported(*a, *b) is expected
    assert supported(*b, *a) is expected


def estimates(samples: np.ndarray, reference: np.ndarray, cached: dict) -> dict[str, Estimate]:
    if not cached:
        statistics = FeatureStatistics.from_features(reference)
        cached |= {"statistics": statistics, "factor": covariance_factor(statistics.cov), "pairs": within(reference)}
    own = within(samples)
    between = across(samples, reference, own, cached["pairs"])
    moments = FeatureStatistics.from_features(samples)
    return {
        "frechet": frechet_estimate(samples, moments, cached["statistics"], cached["factor"]),
        "kernel": kernel_estimate(own, cached["pairs"], between),
        "distance": mean_pair_distance(own),
        **neighbour_estimates(cached["pairs"], between),
    }


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Gaussian samples against a fixed Gaussian reference: the truth of each metric is its mean over many sets.

    250 sets: 95 % has a standard error of 1.4 points. Fréchet's interval may be a little too wide (its influence is
    taken at the samples' own covariance), and recall's and coverage's are wide by design (docs/evaluation.md).
    """
    trials, n, dim = 250, 150, 3
    rng = np.random.default_rng(0)
    reference, cached = rng.normal(size=(300, dim)), {}
    found = [estimates(1.3 * rng.normal(size=(n, dim)) + 0.4, reference, cached) for _ in range(trials)]
    truth = {name: np.mean([one[name].value for one in found]) for name in found[0]}
    hits = dict.fromkeys(truth, 0)
    for seed, one in enumerate(found):
        for name, (low, high) in bootstrap_intervals(one, seed=seed, replicates=400).items():
            hits[name] += low <= truth[name] <= high
    covered = {name: count / trials for name, count in hits.items()}
    for name, part in covered.items():
        widest = 1.0 if name in ("recall", "coverage", "off_manifold") else 0.99
        assert 0.90 <= part <= widest, covered
