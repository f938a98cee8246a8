"""Speed of the feature metrics: 10,000 x 2,048 features to every number, against the reference packages.

Ours: Fréchet distance, KID over all pairs, precision, recall, density, coverage, diversity and all their intervals, the
reference's share included. Theirs on the same features: clean-fid's Fréchet and kernel distance, torch-fidelity's
FID, KID and precision and recall (its default, which holds all distances in memory, and its blockwise one).

    python benchmarks/metrics_speed.py [--num 10000] [--dim 2048] [--threads 2]

Needs torch-fidelity beside the pipeline's packages (`--ours` does without). The limit is that of the matrix products
that the metrics need, at the measured speed of a large product.
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
    from nrcg.evaluation import feature_estimates
    from nrcg.intervals import bootstrap_intervals
    from nrcg.metrics import FeatureStatistics
    from nrcg.pairwise import mean_pair_distance
    from nrcg.references import Reference, ReferenceSet

    num, dim = arguments.num, arguments.dim
    real, samples = features(num, dim, 0), features(num, dim, 1)
    a, b = torch.from_numpy(real[:4096]), torch.from_numpy(samples[:4096])
    a @ b.T
    start = time.perf_counter()
    a @ b.T
    speed = 2 * len(a) * len(b) * dim / (time.perf_counter() - start)
    products = (num * num * (1 + 1 / 2) * 2 * dim, num * num / 2 * 2 * dim)
    print(
        f"{num:,} x {dim:,} features, {torch.get_num_threads()} threads, float32 products at {speed / 1e9:.0f} GFLOP/s"
    )
    print(
        f"limit: {products[0] / speed:.1f} s of products a set of samples, {products[1] / speed:.1f} s for a reference"
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

    once = timed("nrcg: reference", reference)
    own = timed("nrcg: all metrics with intervals", ours)
    if arguments.ours:
        return

    import cleanfid.fid
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
    print(
        f"clean-fid, fid and kid: {clean:.1f} s, {clean / own:.1f} times ours "
        f"({clean / (own + once):.1f} with reference)"
    )
    print(f"torch-fidelity, fid, kid, prc: {fidelity:.1f} s, {fidelity / own:.1f} times ours", end=" ")
    print(f"({fidelity / (own + once):.1f} with reference)")


if __name__ == "__main__":
    sys.exit(main())
