"""Guided DDPM sampling (algorithm 1) and the diffusers pipeline around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from nrcg.datasets import to_uint8
from nrcg.diffusion import Schedule, autocast, freeze, read_data_mean
from nrcg.errors import DataError
from nrcg.guidance import ClassifierGuidance, PredictNoise
from nrcg.noise import sample_noise

START_STREAM = 0
"""Noise stream of x_T within a sample; the step that leaves t uses stream t."""


@dataclass
class GuidedOutput(BaseOutput):
    """What a pipeline call gives.

    Attributes:
        images: PIL images.
        samples: (N, C, H, W) float32 in [-1, 1].
        nonfinite: (N,) bool, samples that turned non-finite; they stand as they were at the step before.
        seconds: wall time of the sampling alone.
    """

    images: list[Image.Image]
    samples: Tensor
    nonfinite: Tensor
    seconds: float


def start_samples(
    schedule: Schedule,
    seed: int,
    samples: Sequence[int],
    shape: Sequence[int],
    device: torch.device,
    data_mean: Tensor | None = None,
) -> Tensor:
    """x_T of some samples, (B, C, H, W).

    N(0, I) as published; with the mean training image, sqrt(abar_T) * mean + sqrt(1 - abar_T) * eps, which is closer
    to the true x_T where abar_T is not small.
    """
    noise = sample_noise(seed, samples, START_STREAM, shape, device)
    if data_mean is None:
        return noise
    return schedule.q_sample(data_mean.to(device).expand_as(noise), schedule.num_steps, noise)


def ddpm_sample(
    x: Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    *,
    seed: int,
    samples: Sequence[int],
    guidance: ClassifierGuidance | None = None,
    clip_pred_x0: bool = True,
    on_step: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: from x_T down to x_0; without guidance the DDPM of Ho et al. 2020.

    Args:
        x: (B, C, H, W) x_T, float32.
        seed: with `samples` gives each sample its own noise.
        samples: (B,) global sample indices.
        clip_pred_x0: clip x0hat to [-1, 1] in the posterior mean, as diffusers' `clip_sample`.
        on_step: called after each step.

    Returns:
        x_0 (B, C, H, W), and (B,) bool: samples that turned non-finite, kept as they were at the step before.
    """
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if guidance is not None:
        guidance.stabilizer.reset()
    for t in range(schedule.num_steps, 0, -1):
        a, b, variance = schedule.posterior(t)
        # The last step has no variance, so nothing to shift by.
        guided = guidance is not None and guidance.scale > 0 and variance > 0
        if guided:
            step = guidance.gradient(x, t, predict_noise, schedule)
            eps = step.eps
        else:
            with torch.no_grad():
                eps = predict_noise(x, t)
        x0 = schedule.pred_x0(x, eps, t)
        if clip_pred_x0:
            x0 = x0.clamp(-1.0, 1.0)
        mean = a * x0 + b * x
        if guided:
            mean = mean + guidance.scale * variance * guidance.stabilizer(step.grad)
        if t > 1:
            mean = mean + variance**0.5 * sample_noise(seed, samples, t, x.shape[1:], x.device)
        alive = alive & mean.isfinite().flatten(1).all(dim=1)
        x = torch.where(alive.reshape(-1, 1, 1, 1), mean, x)
        if on_step is not None:
            on_step()
    return x, ~alive


class GuidedDDPMPipeline(DDPMPipeline):
    """diffusers' DDPMPipeline with classifier guidance and a seed for each sample.

    Opens any folder or hub id of an unconditional eps-predicting DDPM. Called with guidance=None it is the plain DDPM.
    """

    data_mean: Tensor | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> GuidedDDPMPipeline:
        """As diffusers'; also reads the mean training image where the folder holds one.

        Raises:
            DataError: a local folder without a pipeline, or with damaged files.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.exists() and not (folder / "model_index.json").exists():
            raise DataError(f"{folder / 'model_index.json'}: not found; {_remake(folder)}")
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            if not folder.exists():
                raise DataError(
                    f"{folder}: no such folder, and no such diffusers model could be fetched; {_remake(folder)}"
                ) from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{folder}: damaged ({reason}); delete it, then {_remake(folder)}") from error
        pipe.data_mean = read_data_mean(folder) if folder.exists() else None
        pipe.set_progress_bar_config(leave=False)
        return pipe

    def schedule(self) -> Schedule:
        """The scheduler's abar. Raises ValueError for a scheduler whose mathematics is not implemented."""
        config = self.scheduler.config
        if type(self.scheduler).__name__ != "DDPMScheduler":
            raise ValueError(f"scheduler {type(self.scheduler).__name__} is not supported; allowed: DDPMScheduler")
        supported = {
            "prediction_type": "epsilon",
            "variance_type": "fixed_small",
            "thresholding": False,
            "clip_sample_range": 1.0,
        }
        for key, allowed in supported.items():
            if config[key] != allowed:
                raise ValueError(f"scheduler {key} {config[key]!r} is not supported; allowed: {allowed}")
        return Schedule.from_scheduler(self.scheduler)

    def noise_predictor(self, precision: torch.dtype) -> PredictNoise:
        """The U-Net as a function of (x_t, t) with t in 1..T, under autocast, float32 in and out."""
        unet = freeze(self.unet)

        def predict_noise(x: Tensor, t: int) -> Tensor:
            with autocast(x.device, precision):
                return unet(x, torch.full((len(x),), t - 1, device=x.device)).sample.float()

        return predict_noise

    def __call__(
        self,
        num_samples: int = 1,
        batch_size: int = 16,
        seed: int = 0,
        guidance: ClassifierGuidance | None = None,
        *,
        first_sample: int = 0,
        start: str = "auto",
        precision: torch.dtype = torch.float32,
        on_step: Callable[[], None] | None = None,
    ) -> GuidedOutput:
        """Draw samples.

        Args:
            num_samples: N.
            batch_size: samples at once; changes memory and speed, never the samples.
            seed: sample i depends on (seed, first_sample + i) alone.
            guidance: None samples the plain DDPM.
            first_sample: global index of the first sample, to draw a run in parts.
            start: `standard_normal`, `data_mean`, or `auto`: data_mean where the folder holds it.
            precision: autocast of the U-Net; x_t, the gradient and the stabilizer stay in float32.
            on_step: called after each step of each batch, instead of the progress bar.

        Raises:
            ValueError: a setting or a scheduler that is not supported, a classifier that does not fit.
        """
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("batch_size", batch_size, 1),
            ("first_sample", first_sample, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: {value} is less than {least}")
        schedule, device = self.schedule(), self.device
        data_mean = self._start_mean(start)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (self.unet.config.in_channels, height, width)
        if guidance is not None:
            guidance.to(device).check(torch.empty(1, *shape, device=device))
        predict_noise = self.noise_predictor(precision)
        if on_step is None:
            bar = self.progress_bar(total=schedule.num_steps * -(-num_samples // batch_size))
            on_step = bar.update
        began = time.perf_counter()
        done: list[Tensor] = []
        failed: list[Tensor] = []
        for first in range(first_sample, first_sample + num_samples, batch_size):
            indices = range(first, min(first + batch_size, first_sample + num_samples))
            x = start_samples(schedule, seed, indices, shape, device, data_mean)
            x, nonfinite = ddpm_sample(
                x,
                predict_noise,
                schedule,
                seed=seed,
                samples=indices,
                guidance=guidance,
                clip_pred_x0=bool(self.scheduler.config.clip_sample),
                on_step=on_step,
            )
            done.append(x.clamp(-1.0, 1.0).cpu())
            failed.append(nonfinite.cpu())
        seconds = time.perf_counter() - began
        samples = torch.cat(done)
        images = [Image.fromarray(image.squeeze()) for image in to_uint8(samples)]
        return GuidedOutput(images=images, samples=samples, nonfinite=torch.cat(failed), seconds=seconds)

    def _start_mean(self, start: str) -> Tensor | None:
        if start not in ("auto", "standard_normal", "data_mean"):
            raise ValueError(f"start: {start!r} is unknown; allowed: auto, standard_normal, data_mean")
        if start == "data_mean" and self.data_mean is None:
            raise ValueError("start: data_mean needs the file data_mean.npy beside the pipeline's model_index.json")
        return None if start == "standard_normal" else self.data_mean


def _remake(folder: Path) -> str:
    return f"run: nrcg train-ddpm --config config.yaml --experiment EXPERIMENT --data DATA --out {folder}"
