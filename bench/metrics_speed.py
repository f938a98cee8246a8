"""Speed of the feature metrics: 10,000 x 2,048 features to every number, against the reference packages.

Ours: Fréchet distance, KID over all pairs, precision, recall, density, coverage and diversity, with all their intervals
and without. Theirs on the same features: clean-fid's Fréchet and kernel distance, torch-fidelity's FID, KID and
precision and recall, prdc's four numbers.

    python bench/metrics_speed.py [--num 10000] [--dim 2048] [--threads 2]

Needs torch-fidelity and prdc beside the pipeline's packages (`--ours` does without). The limit is that of the matrix
products that the metrics need, at the measured speed of a large product.
"""

import argparse
import sys
import time

import numpy as np


def features(count: int, dim: int, seed: int) -> np.ndarray:
    """Non-negative, correlated, with a falling spectrum, as a network's features are."""
    mixing = np.random.default_rng(0).normal(size=(dim, dim)) / np.sqrt(dim) / (1 + np.arange(dim))[:, None] ** 0.5
    hidden = np.random.default_rng([seed, 1]).normal(size=(count, dim))
    return np.maximum(0.3 + (hidden @ mixing) * (1 + 0.05 * seed), 0).astype(np.float32)


def timed(name: str, run) -> float:
    start = time.perf_counter()
    value = run()
    seconds = time.perf_counter() - start
    print(f"{name:46} {seconds:8.1f} s   {value}", flush=True)
    return seconds


def product_speed(rows) -> float:
    """Floating point operations a second of a large product, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        rows @ rows.T
        seconds.append(time.perf_counter() - start)
    return 2 * rows.shape[0] ** 2 * rows.shape[1] / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ours", action="store_true", help="leave the other packages out")
    arguments = parser.parse_args()

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from nrcg.evaluation.evaluate import feature_estimates
    from nrcg.evaluation.frechet import FeatureStatistics, frechet_distance
    from nrcg.evaluation.intervals import bootstrap_intervals
    from nrcg.evaluation.pairwise import across, kernel_estimate, mean_pair_distance, neighbour_estimates, within
    from nrcg.evaluation.references import Reference, ReferenceSet

    num, dim = arguments.num, arguments.dim
    real, samples = features(num, dim, 0), features(num, dim, 1)
    speeds = {
        dtype: product_speed(torch.from_numpy(samples[:4096]).to(dtype)) for dtype in (torch.float32, torch.float64)
    }
    single, double = speeds.values()
    pairs = num * num * dim / single, 2 * num * num * dim / single  # of one set, of two
    sums, square, turned = num * dim * dim / double, 2 * dim**3 / double, 2 * num * dim * dim / single
    print(
        f"{num:,} x {dim:,} features, {torch.get_num_threads()} threads, products at {single / 1e9:.0f} GFLOP/s in "
        f"float32, {double / 1e9:.0f} in float64"
    )
    print(
        f"limit: {pairs[0] + pairs[1] + sums + 3 * square + turned:.1f} s of products a set of samples, "
        f"{pairs[0] + pairs[1] + sums + 2 * square:.1f} s without intervals, {pairs[0] + sums:.1f} s for a reference"
    )

    kept = {}

    def reference() -> str:
        one = ReferenceSet.make(FeatureStatistics.from_features(real), real, "cpu")
        kept["reference"] = Reference("inception", "", "", one, None, mean_pair_distance(one.pairs).value)
        return "once for all sets of samples"

    def ours() -> str:
        found = feature_estimates(samples, kept["reference"])
        bounds = bootstrap_intervals(found)
        return ", ".join(
            f"{name} {found[name].value:.5g} ({bounds[name][0]:.5g}..{bounds[name][1]:.5g})" for name in found
        )

    def plain() -> str:
        """The reference packages' numbers and no more."""
        one = kept["reference"].everything
        pairs = within(samples)
        between = across(samples, one.features, pairs, one.pairs)
        near = neighbour_estimates(one.pairs, between)
        values = {
            "fid": frechet_distance(one.statistics, FeatureStatistics.from_features(samples)),
            "kid": kernel_estimate(pairs, one.pairs, between).value,
            **{name: near[name].value for name in ("precision", "recall", "density", "coverage")},
        }
        return ", ".join(f"{name} {value:.5g}" for name, value in values.items())

    once = timed("nrcg: reference", reference)
    own = timed("nrcg: all metrics with intervals", ours)
    bare = timed("nrcg: the packages' metrics, no intervals", plain)
    if arguments.ours:
        return

    import cleanfid.fid
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.mean(x, axis=0), np.cov(x, rowvar=False)

    clean = timed("clean-fid: fid", lambda: cleanfid.fid.frechet_distance(*moments(samples), *moments(real)))
    clean += timed("clean-fid: kid", lambda: cleanfid.fid.kernel_distance(samples, real))
    x, y = torch.from_numpy(samples), torch.from_numpy(real)
    options = {"verbose": False}
    fidelity = timed(
        "torch-fidelity: fid",
        lambda: fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False),
    )
    fidelity += timed("torch-fidelity: kid", lambda: kid_features_to_metric(x, y, **options))
    fidelity += timed("torch-fidelity: precision and recall", lambda: prc_features_to_metric(x, y, **options))
    prdc = timed("prdc: precision, recall, density, coverage", lambda: compute_prdc(real, samples, nearest_k=5))
    for name, seconds in (
        ("clean-fid, fid and kid", clean),
        ("torch-fidelity, fid, kid, precision and recall", fidelity),
        ("clean-fid, and prdc for the rest", clean + prdc),
    ):
        print(
            f"{name}: {seconds:.1f} s, {seconds / bare:.1f} times our time for the same numbers, "
            f"{seconds / own:.1f} times that with intervals ({seconds / (own + once):.1f} with the reference)"
        )


if __name__ == "__main__":
    sys.exit(main())
