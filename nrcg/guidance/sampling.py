"""Algorithm 1: the guided reverse process, whatever the sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import ClassifierGuidance, PredictNoise
from nrcg.guidance.samplers import Sampler
from nrcg.guidance.trace import TraceRecorder

START_STREAM = 0
"""Noise stream of x_T within a sample; the step that leaves t uses stream t."""


def start_samples(
    schedule: Schedule,
    seed: int,
    samples: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
    data_mean: Tensor | None = None,
    t: int | None = None,
) -> Tensor:
    """x_T of some samples, (B, C, H, W); or x_t, where skipped steps let the chain start below T.

    N(0, I) as published; with the mean training image, sqrt(abar_T) * mean + sqrt(1 - abar_T) * eps, which is closer
    to the true x_T where abar_T is not small.
    """
    noise = sample_noise(seed, samples, START_STREAM, shape, device)
    if data_mean is None:
        return noise
    return schedule.q_sample(data_mean.to(device).expand_as(noise), schedule.num_steps if t is None else t, noise)


def guided_sample(
    x: Tensor,
    predict_noise: PredictNoise,
    sampler: Sampler,
    timesteps: Sequence[int],
    *,
    seed: int,
    samples: Sequence[int],
    guidance: ClassifierGuidance | None = None,
    recorder: TraceRecorder | None = None,
    on_step: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """From x_T down to x_0. With the sampler DDPM and all steps this is the paper's algorithm 1.

    Args:
        x: (B, C, H, W) x at the first timestep, float32.
        timesteps: falling, from 1..T; after the last the chain reaches x_0.
        seed: with `samples` gives each sample its own noise.
        samples: (B,) global sample indices.
        recorder: watches the guided steps.
        on_step: called after each step.

    Returns:
        x_0 (B, C, H, W), and (B,) bool: samples that turned non-finite, kept as they were at the step before.
    """
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    sampler.reset()
    if guidance is not None:
        guidance.reset()
    for t, t_prev in zip(timesteps, [*timesteps[1:], 0], strict=True):
        shift = None
        # Where the scale is zero the gradient would be multiplied by it: none is taken, and the stabilizer waits.
        guided = guidance is not None and sampler.takes_guidance(t, t_prev)
        if guided and guidance.acts_at(t, sampler.schedule):
            prediction, shift = guidance(x, t, predict_noise, sampler.schedule)
            if recorder is not None:
                recorder.record(x, t, prediction, guidance, sampler.schedule)
        else:
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x, t))
        noise = sample_noise(seed, samples, t, x.shape[1:], x.device) if sampler.needs_noise(t_prev) else None
        pull = None if guidance is None else guidance.pull_at(t, sampler.schedule)
        new = sampler.step(x, t, t_prev, prediction, shift, noise, pull)
        alive = alive & new.isfinite().flatten(1).all(dim=1)
        x = torch.where(alive.reshape(-1, 1, 1, 1), new, x)
        if on_step is not None:
            on_step()
    return x, ~alive
