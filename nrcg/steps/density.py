"""A distribution whose density is known, learned by each objective: bound and ODE beside the truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from nrcg import tracking
from nrcg.config import DensityStep, ObjectiveConfig
from nrcg.csv_files import write_csv
from nrcg.data.densities import DENSITIES, Density, GaussianMixture
from nrcg.diffusion.exact import mixture_predictor
from nrcg.diffusion.likelihood import bound, flow_log_density
from nrcg.diffusion.objectives import NATIVE
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_scheduler
from nrcg.errors import DataError
from nrcg.evaluation.evaluate import with_error
from nrcg.files import atomic_save_arrays
from nrcg.guidance.guidance import PredictNoise
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.sampling import guided_sample, start_samples
from nrcg.pipeline.progress import Progress
from nrcg.report.densities import PERFECT
from nrcg.steps.likelihood_table import mean_and_error
from nrcg.training.density import train_points

UNIT = 2 * math.log(2)
"""Nats of a point in a bit per dimension."""
VARIANCE = "fixed_large"
"""Of p(x_{t-1} | x_t): with beta_t the bound's gap falls as 1/T, since that is the variance of x_{t-1} given x_t where
the noise is small beside the data. By the posterior's it would tend to a constant."""
TEST_SEED = 1_000_003


def measure_density(settings: DensityStep, *, out: Path, models: Path, device: torch.device) -> list[dict[str, Any]]:
    """Train a network of points by each objective, and hold its bound and its ODE likelihood against the true density.

    Where the posterior is known, a perfect network stands beside them: its gap is the discretisation's alone.

    Args:
        settings: The distribution and the objectives.
        out: The table; the points beside it (.npz).
        models: Folder that takes a diffusers folder for each objective.
        device: Device that computes.

    Returns:
        A row for each objective, in bits per dimension: `true`, the cross-entropy of the test points under the true
        density; bound and flow; and what they exceed it by, point for point.
    """
    config, name = settings.densities, settings.density
    density = DENSITIES[name]()
    train = torch.from_numpy(density.draw(config.num_train, config.seed))
    test = density.draw(config.num_test, config.seed + TEST_SEED)
    rows, points = [], {"true": density.draw(config.num_drawn, config.seed + TEST_SEED + 1)}
    work = len(config.cells) * config.num_steps
    with Progress(f"density {name}", work, "step") as bar:
        for number, (cell, objective) in enumerate(config.cells.items()):
            params = settings.model_dump() | {"objective": cell}
            tags = {"density": name, "objective": cell}
            with tracking.run(
                settings.experiment, f"{name} {cell}", kind="density", params=params, tags=tags, deferred=True
            ) as run:
                before = number * config.num_steps
                net, loss = train_points(
                    config, objective, train, device=device, on_step=lambda step, before=before: bar.set(before + step)
                )
                pipe = GuidedDDPMPipeline(net, _scheduler(settings, objective)).to(device)
                pipe.save_pretrained(models / cell)
                row = {"density": name, "objective": cell, "loss": loss}
                row |= _measured(pipe.noise_predictor(torch.float32), pipe.schedule(), density, test, device)
                rows.append(row)
                points[cell] = _drawn(pipe, config.num_drawn, config.seed)
                run.log_metrics({key: value for key, value in row.items() if isinstance(value, float)})
    if isinstance(density, GaussianMixture):
        schedule = Schedule.from_config(config.schedule)
        perfect = mixture_predictor(torch.from_numpy(density.means), density.std, schedule)
        row = {"density": name, "objective": PERFECT, "loss": math.nan}
        rows.append(row | _measured(perfect, schedule, density, test, device))
    _check(rows, name)
    atomic_save_arrays(out.with_suffix(".npz"), points)
    write_csv(out, rows, list(rows[0]))
    return rows


def _scheduler(settings: DensityStep, objective: ObjectiveConfig) -> DDPMScheduler:
    scheduler = build_scheduler(settings.densities.schedule, NATIVE[objective.predicts])
    scheduler.register_to_config(clip_sample=False, variance_type=VARIANCE)  # points are not bounded
    return scheduler


def _drawn(pipe: GuidedDDPMPipeline, count: int, seed: int) -> np.ndarray:
    """(N, 2) points that a network draws: not clipped to the range of pixels, as the pipeline's samples are."""
    samples, schedule = range(count), pipe.schedule()
    start = start_samples(schedule, seed, samples, pipe.image_shape(), pipe.device)
    predict, steps = pipe.noise_predictor(torch.float32), pipe.timesteps()
    x, _ = guided_sample(start, predict, pipe.sampler(), steps, seed=seed, samples=samples)
    return x.flatten(1).cpu().numpy()


def _measured(
    predict: PredictNoise, schedule: Schedule, density: Density, test: np.ndarray, device: torch.device
) -> dict[str, float]:
    """Columns of the table, for a network."""
    x0 = torch.from_numpy(test).to(device, torch.float32)[..., None, None]
    truth = -density.log_density(x0.flatten(1).double().cpu().numpy())
    found = bound(predict, schedule, x0, range(len(x0)), variance=VARIANCE, continuous=True).nats.numpy()
    columns = {"entropy": density.entropy / UNIT, "true": float(truth.mean() / UNIT)}
    columns |= _column("bound", found / UNIT) | _column("bound_gap", (found - truth) / UNIT)
    flow = -flow_log_density(predict, schedule, x0).cpu().numpy()
    return columns | _column("flow", flow / UNIT) | _column("flow_gap", (flow - truth) / UNIT)


def _column(name: str, values: np.ndarray) -> dict[str, float]:
    return with_error(name, *mean_and_error(values))


def _check(rows: list[dict[str, Any]], name: str) -> None:
    """Refuse a likelihood that is not finite."""
    for row in rows:
        if not math.isfinite(row["bound"]):
            raise DataError(f"density {name}: the bound of {row['objective']} is not finite; train longer or slower")
