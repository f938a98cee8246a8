"""Synthetic results in the pipeline's layout, with the paper's effects built in: no model is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nrcg.csv_files import write_csv
from nrcg.layout import format_scale
from nrcg.report.columns import FORWARD_COLUMNS, METRICS_COLUMNS

STEPS = 100
CLASSES = ["baseball", "basketball", "soccer"]
NAN = float("nan")
COLUMNS = (*METRICS_COLUMNS, "fd_judge", "cfd_judge", "kd_judge", "ckd_judge", "mlflow_run_id")

# method -> scale -> accuracy by the judge, cfd_judge, fd_judge
SWEEP = {
    "unconditional": {0: (0.31, 60.0, 9.0)},
    "robust": {5: (0.62, 33.0, 14.0), 10: (0.81, 21.0, 22.0), 20: (0.93, 16.0, 29.0)},
    "robust_x0": {5: (0.66, 30.0, 15.0), 10: (0.85, 19.0, 23.0), 20: (0.91, 20.5, 31.0)},
    "non_robust": {5: (0.33, 150.0, 120.0), 20: (0.02, 410.0, 380.0)},
    "non_robust_x0": {4: (0.41, 49.0, 17.0), 8: (0.55, 39.0, 24.0), 16: (0.52, 71.0, 55.0)},
    "non_robust_x0_ema90": {8: (0.58, 36.0, 17.0), 15: (0.71, 27.0, 22.0), 25: (0.74, 31.0, 33.0)},
    "non_robust_x0_ema99": {
        8: (0.61, 34.0, 15.0),
        15: (0.82, 20.0, 20.0),
        25: (0.92, 12.5, 25.0),
        40: (0.94, 15.0, 29.0),
    },
    "non_robust_x0_adam": {0.03: (0.39, 47.0, 15.0), 0.1: (0.56, 35.0, 29.0), 0.3: (0.60, 90.0, 95.0)},
}


def forward_rows(steps: int = STEPS) -> list[dict]:
    """Rows of forward.csv for t = 1..steps."""
    rows = []
    for t in range(1, steps + 1):
        u = t / steps
        accuracy = {
            "robust": 1 - 0.25 * u**3,
            "non_robust": max(0.34, 1 - 3.2 * u),
            "non_robust_x0": 1 - 0.35 * u**2,
        }
        logit = {"robust": 0.08, "non_robust": 6 * np.exp(-2 * u), "non_robust_x0": 0.8 * (1 + u)}
        gradient = {"robust": 0.02, "non_robust": 5 * np.exp(-2 * u), "non_robust_x0": 0.4 * (1 + u)}
        factors = {"_ema90": 0.2, "_ema99": 0.04, "_adam": 0.3 + 9 * u**2}
        for method in accuracy:
            for suffix in ("", *factors) if method == "non_robust_x0" else ("",):
                change = gradient[method] * factors.get(suffix, 1)
                rows.append(
                    {
                        "method": method + suffix,
                        "t": t,
                        "num_images": 128,
                        "accuracy": accuracy[method],
                        "logit_sensitivity_mean": logit[method],
                        "logit_sensitivity_std": 0.7 * logit[method],
                        "gradient_sensitivity_mean": change,
                        "gradient_sensitivity_std": 1.4 * change,
                    }
                )
    return rows


def metric_rows(experiment: str = "quickstart") -> list[dict]:
    """Rows of metrics.csv with the judge's features, without a nan."""
    return [
        {
            "experiment": experiment,
            "method": method,
            "scale": float(scale),
            "num_samples": 128.0,
            "accuracy_guide": min(1.0, accuracy + 0.07),
            "accuracy_judge": accuracy,
            "fd_judge": distance,
            "cfd_judge": conditional,
            "kd_judge": distance / 400,
            "ckd_judge": conditional / 400,
            "precision": 0.9 - distance / 600,
            "recall": 0.7 - conditional / 800,
            "nonfinite": 0.0,
            "images_per_second": 2.4,
            "peak_memory_mib": NAN,
            "mlflow_run_id": "0" * 32,
        }
        for method, scales in SWEEP.items()
        for scale, (accuracy, conditional, distance) in scales.items()
    ]


def inception_rows(rows: list[dict]) -> list[dict]:
    """The same rows named as those of the published protocol, torcheval's Inception."""
    return [
        {
            key.replace("fd_judge", "fid_torcheval").replace("kd_judge", "kid_torcheval"): value
            for key, value in row.items()
        }
        for row in rows
    ]


def balls(count: int, size: int, seed: int, noise: float = 0.0) -> np.ndarray:
    """(count, size, size, 3) uint8: a disc on white, image i drawn by (seed, i)."""
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        cx, cy, radius = *rng.uniform(0.35, 0.65, 2), rng.uniform(0.2, 0.32)
        color = np.array([[0.85, 0.85, 0.82], [0.85, 0.45, 0.15], [0.2, 0.2, 0.2]])[rng.integers(3)]
        image = np.where(((x - cx) ** 2 + (y - cy) ** 2 < radius**2)[..., None], color, 1.0)
        image = (1 - noise) * image + noise * rng.random((size, size, 3))
        images[i] = np.rint(255 * image)
    return images


def write_results(root: Path, *, experiment: str = "quickstart", size: int = 24, count: int = 64) -> dict[str, Path]:
    """Write results/ and models/ of an experiment below `root`; return the paths that figures and report take."""
    results, models = root / "results" / experiment, root / "models" / experiment
    write_csv(results / "forward.csv", forward_rows(), FORWARD_COLUMNS)
    rows = metric_rows(experiment)
    write_csv(results / "metrics.csv", rows, COLUMNS)
    for row in rows:
        folder = results / "samples" / row["method"] / f"scale{format_scale(row['scale'])}"
        folder.mkdir(parents=True)
        noise = 0.9 if row["method"] == "non_robust" else 0.05
        np.save(folder / "shard0000.npy", balls(count, size, 0, noise))
    _write_models(models, size)
    return {
        "forward_csv": results / "forward.csv",
        "metrics_csv": results / "metrics.csv",
        "samples_dir": results / "samples",
        "figures_dir": results / "figures",
        "models_dir": models,
    }


def _write_models(models: Path, size: int) -> None:
    from nrcg.data.pictures import sample_grid, save_png

    curve = [
        {
            "epoch": epoch,
            "step": 125 * epoch,
            "train_loss": 0.03 + 0.3 / epoch**1.3,
            "val_loss": 0.035 + 0.25 / epoch**1.3,
            "learning_rate": 1.5e-3 * (1 - epoch / 10),
            "images_per_second": 210.0,
        }
        for epoch in range(1, 10)
    ]
    write_csv(models / "ddpm" / "training.csv", curve, list(curve[0]))
    save_png(models / "ddpm" / "samples.png", sample_grid(balls(32, size, 7), 8, 2))
    for role, architecture, fall in (
        ("non_robust", "mobilenet_v3_small", 3.2),
        ("robust", "mobilenet_v3_small", 0.25),
        ("judge", "small_cnn", 2.5),
    ):
        folder = models / "classifiers" / role
        folder.mkdir(parents=True)
        settings = {"architecture": architecture, "classes": CLASSES, "validation_accuracy": 0.993}
        (folder / "config.json").write_text(json.dumps(settings))
        table = [{"t": t, "accuracy": max(0.34, 1 - fall * t / STEPS)} for t in range(0, STEPS + 1, 10)]
        write_csv(folder / "accuracy_over_t.csv", table, ["t", "accuracy"])


def context(experiment: str = "quickstart") -> dict:
    """What the report is told about an experiment."""
    return {
        "experiment": experiment,
        "description": "SportBalls at 24 x 24 pixels, small enough for a laptop's CPU.",
        "target": "baseball",
        "classes": CLASSES,
        "T": STEPS,
        "num_samples": 128,
        "start": "data_mean",
        "dataset": "sportballs24",
        "target_share": 0.334,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"nrcg": "0.1.0", "python": "3.11.2", "torch": "2.9.0"},
        "settings": {
            "ddpm": {"unet": {"block_out_channels": [32, 64, 96]}, "epochs": 9},
            "sampling": {"num_samples": 128, "start": "data_mean", "clip_pred_x0": True},
        },
    }
