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
from nrcg.diffusion import (
    Prediction,
    Schedule,
    as_prediction,
    autocast,
    freeze,
    read_data_mean,
    to_eps,
)
from nrcg.errors import DataError
from nrcg.guidance import ClassifierGuidance, PredictNoise
from nrcg.noise import sample_noise
from nrcg.samplers import DDIM, DDPM, DPMSolverPP, Sampler

START_STREAM = 0
"""Noise stream of x_T within a sample; the step that leaves t uses stream t."""


_PLAIN = {"thresholding": (False,)}
SUPPORTED: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": _PLAIN | {"clip_sample_range": (1.0,), "variance_type": DDPM.VARIANCES},
    "DDIMScheduler": _PLAIN | {"clip_sample_range": (1.0,), "set_alpha_to_one": (True,)},
    "DPMSolverMultistepScheduler": _PLAIN
    | {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_flow_sigmas": (False,),
        "use_lu_lambdas": (False,),
    },
}
"""Schedulers whose mathematics is implemented, and the settings of them that are. Others are refused: a guidance that
is silently left out would be worse."""


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
    on_step: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """From x_T down to x_0. With the sampler DDPM and all steps this is the paper's algorithm 1.

    Args:
        x: (B, C, H, W) x at the first timestep, float32.
        timesteps: falling, from 1..T; after the last the chain reaches x_0.
        seed: with `samples` gives each sample its own noise.
        samples: (B,) global sample indices.
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
        if guidance is not None and guidance.scale != 0 and sampler.takes_guidance(t_prev):
            prediction, shift = guidance(x, t, predict_noise, sampler.schedule)
        else:
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x, t))
        noise = sample_noise(seed, samples, t, x.shape[1:], x.device) if sampler.needs_noise(t_prev) else None
        new = sampler.step(x, t, t_prev, prediction, shift, noise)
        alive = alive & new.isfinite().flatten(1).all(dim=1)
        x = torch.where(alive.reshape(-1, 1, 1, 1), new, x)
        if on_step is not None:
            on_step()
    return x, ~alive


class GuidedDDPMPipeline(DDPMPipeline):
    """diffusers' DDPMPipeline with classifier guidance and a seed for each sample.

    Opens any folder or hub id of an unconditional DDPM. Called with guidance=None it is the plain DDPM. A call puts the
    U-Net into eval mode and freezes its parameters.
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
        """The scheduler's abar."""
        return Schedule.from_scheduler(self.scheduler)

    def sampler(self, eta: float = 0.0) -> Sampler:
        """The scheduler's mathematics, with a place for the guidance.

        Args:
            eta: for DDIM, share of the ancestral sampler's noise, in [0, 1].

        Raises:
            ValueError: a scheduler or a setting of it that is not supported.
        """
        name = type(self.scheduler).__name__
        if name not in SUPPORTED:
            raise ValueError(f"scheduler {name} is not supported; allowed: {', '.join(SUPPORTED)}")
        config = self.scheduler.config
        for key, allowed in SUPPORTED[name].items():
            if config.get(key, allowed[0]) not in allowed:  # older versions lack some keys
                raise ValueError(
                    f"scheduler {key} {config[key]!r} is not supported; allowed: {', '.join(map(str, allowed))}"
                )
        if eta and name != "DDIMScheduler":
            raise ValueError(f"eta: {eta} is for a DDIMScheduler; the pipeline has a {name}")
        schedule, clip = self.schedule(), bool(config.get("clip_sample", False))
        if name == "DDIMScheduler":
            return DDIM(schedule, clip, eta)
        if name == "DPMSolverMultistepScheduler":
            return DPMSolverPP(schedule, False)  # as diffusers': the solver knows no clip_sample
        return DDPM(schedule, clip, config["variance_type"])

    def timesteps(self, num_inference_steps: int | None = None) -> list[int]:
        """The steps t in 1..T that are taken, falling, as the scheduler spaces them; None takes all T.

        Raises:
            ValueError: not between 1 and T.
        """
        num_steps = len(self.scheduler.betas)
        if num_inference_steps is None:
            return list(range(num_steps, 0, -1))
        if not 1 <= num_inference_steps <= num_steps:
            raise ValueError(f"num_inference_steps: {num_inference_steps} is not in 1..{num_steps}")
        self.scheduler.set_timesteps(num_inference_steps)
        # Some spacings round two steps to one.
        return list(dict.fromkeys(int(t) + 1 for t in self.scheduler.timesteps))

    def noise_predictor(self, precision: torch.dtype) -> PredictNoise:
        """The U-Net as a function of (x_t, t) with t in 1..T, under autocast, float32 in and out, whatever it predicts.

        Raises:
            ValueError: a prediction type that is not supported.
        """
        unet, schedule = freeze(self.unet), self.schedule()
        kind = self.scheduler.config["prediction_type"]
        channels = unet.config.in_channels
        to_eps(torch.zeros(1, 1), torch.zeros(1, 1), 1, schedule, kind)  # an unknown kind is refused here

        def predict_noise(x: Tensor, t: int) -> Prediction:
            with autocast(x.device, precision):
                output = unet(x, torch.full((len(x),), t - 1, device=x.device)).sample.float()
            share = (output[:, channels:] + 1.0) / 2.0 if output.shape[1] == 2 * channels else None
            return Prediction(to_eps(output[:, :channels], x, t, schedule, kind), share)

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
        num_inference_steps: int | None = None,
        eta: float = 0.0,
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
            num_inference_steps: steps taken, 1..T; None takes all. Set `pipe.scheduler` to a DDIMScheduler or a
                DPMSolverMultistepScheduler for samplers that need few.
            eta: for DDIM, share of the ancestral sampler's noise, in [0, 1].
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
        sampler, timesteps, device = self.sampler(eta), self.timesteps(num_inference_steps), self.device
        data_mean = self._start_mean(start)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (self.unet.config.in_channels, height, width)
        if guidance is not None:
            guidance.to(device).check(torch.empty(1, *shape, device=device))
        predict_noise = self.noise_predictor(precision)
        if guidance is not None and guidance.grad_mode == "checkpoint":
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        bar = None
        if on_step is None:
            bar = self.progress_bar(total=len(timesteps) * -(-num_samples // batch_size))
            on_step = bar.update
        began = time.perf_counter()
        done: list[Tensor] = []
        failed: list[Tensor] = []
        for first in range(first_sample, first_sample + num_samples, batch_size):
            indices = range(first, min(first + batch_size, first_sample + num_samples))
            x = start_samples(sampler.schedule, seed, indices, shape, device, data_mean, timesteps[0])
            x, nonfinite = guided_sample(
                x,
                predict_noise,
                sampler,
                timesteps,
                seed=seed,
                samples=indices,
                guidance=guidance,
                on_step=on_step,
            )
            done.append(x.clamp(-1.0, 1.0).cpu())
            failed.append(nonfinite.cpu())
        seconds = time.perf_counter() - began
        if bar is not None:
            bar.close()
        if guidance is not None:
            guidance.reset()  # its state holds the last batch's gradients
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
