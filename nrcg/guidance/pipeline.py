"""Guided DDPM sampling (algorithm 1) and the diffusers pipeline around it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.config import PRECISIONS, STARTS, Compile
from nrcg.data.arrays import to_uint8
from nrcg.devices import autocast, floating_type, freeze, frozen, resolve_precision
from nrcg.diffusion.compiling import compiled_unet, forward_flop, wants_compiling
from nrcg.diffusion.objectives import Prediction, to_eps
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.storage import check_pipeline_files, forget_folder, read_data_mean
from nrcg.errors import DataError, whole_number
from nrcg.guidance.guidance import ClassifierGuidance, PredictNoise
from nrcg.guidance.samplers import DDIM, DDPM, DPMSolverPP, Sampler
from nrcg.guidance.sampling import guided_sample, start_samples
from nrcg.guidance.trace import Trace, TraceRecorder

_PLAIN = {"thresholding": (False,), "rescale_betas_zero_snr": (False,)}
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
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"}
"""Sampler of the configuration -> its scheduler; `model` keeps the model's own."""


@dataclass
class GuidedOutput(BaseOutput):
    """What a pipeline call gives.

    Attributes:
        images: PIL images; none where the samples have neither one nor three channels.
        samples: (N, C, H, W) float32 in [-1, 1].
        nonfinite: (N,) bool, samples that turned non-finite; they stand as they were at the step before.
        seconds: wall time of the sampling alone.
        trace: what the guidance did in each step, where asked for.
    """

    images: list[Image.Image]
    samples: Tensor
    nonfinite: Tensor
    seconds: float
    trace: Trace | None = None


Start = Callable[[Sequence[int]], Tensor]
"""Places of samples in a run to their x at its first timestep, (B, C, H, W) float32."""


@dataclass
class _Batches:
    """Draws a call's samples, batch by batch."""

    predict_noise: PredictNoise
    sampler: Sampler
    timesteps: list[int]
    guidance: ClassifierGuidance | None
    seed: int
    samples: Sequence[int]
    start: Start
    trace: bool
    report: Callable[[int], None]
    one_shape: bool  # the last batch is filled up with copies of the last sample
    traces: list[Trace] = field(default_factory=list)
    whole: int = 0  # samples of the last batch that fitted into the memory

    def __call__(self, batch: range) -> tuple[Tensor, Tensor]:
        """Samples (B, C, H, W) in [-1, 1], and which are not finite."""
        count = max(len(batch), self.whole) if self.one_shape else len(batch)
        places = [min(place, len(self.samples) - 1) for place in range(batch.start, batch.start + count)]
        steps = self.timesteps
        if self.guidance is not None:
            self.guidance.select(places)
        recorder = TraceRecorder() if self.trace else None
        done = itertools.count(batch.start * len(steps) + len(batch), len(batch))
        x, nonfinite = guided_sample(
            self.start(places),
            self.predict_noise,
            self.sampler,
            steps,
            seed=self.seed,
            samples=[self.samples[place] for place in places],
            guidance=self.guidance,
            recorder=recorder,
            on_step=lambda: self.report(next(done)),
        )
        if recorder is not None:
            self.traces.append(recorder.result(len(batch)))
        self.whole = count
        return x[: len(batch)].clamp(-1.0, 1.0).cpu(), nonfinite[: len(batch)].cpu()


class GuidedDDPMPipeline(DDPMPipeline):
    """diffusers' DDPMPipeline with classifier guidance and a seed for each sample.

    Opens any folder or hub id of an unconditional DDPM, in any floating type. Called with guidance=None it is the plain
    DDPM. While it draws, the U-Net is in eval mode with frozen parameters; what it had before is given back.
    """

    data_mean: Tensor | None = None
    _compiled: tuple[object, Callable[[Tensor, Tensor], Tensor]] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> GuidedDDPMPipeline:
        """As diffusers'; also reads the mean training image where the folder holds one.

        Raises:
            DataError: a local folder without a pipeline, or with damaged files.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.exists() and not (folder / "model_index.json").exists():
            raise DataError("not found", folder / "model_index.json")
        check_pipeline_files(folder)
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            if not folder.exists():
                raise DataError(f"{folder}: no such folder, and no such diffusers model could be fetched") from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"damaged ({reason})", folder / "model_index.json") from error
        if folder.exists():
            pipe.data_mean = read_data_mean(folder)
            forget_folder(pipe, pipe.unet)
        pipe.set_progress_bar_config(leave=False)
        return pipe

    def with_weights(self, dtype: torch.dtype | str | None) -> GuidedDDPMPipeline:
        """The U-Net's weights in another type; None: as they are. For speed instead of autocast, at half the memory."""
        if dtype is not None:
            # Past diffusers' own `to`, which warns of it whatever the model.
            torch.nn.Module.to(self.unet, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return self

    def schedule(self) -> Schedule:
        """The scheduler's abar."""
        return Schedule.from_scheduler(self.scheduler)

    def use_sampler(self, name: str) -> GuidedDDPMPipeline:
        """Exchange the scheduler for another with the same betas: `ddpm`, `ddim`, `dpmpp` (DPM-Solver++ 2M), or
        `model`, which leaves it as it is.

        Raises:
            ValueError: another name.
        """
        if name == "model":
            return self
        if name not in SCHEDULERS:
            raise ValueError(f"sampler: {name!r} is unknown; allowed: model, {', '.join(SCHEDULERS)}")
        # Trailing: fewer steps start at T, where the noise is what sampling starts from.
        scheduler = getattr(diffusers, SCHEDULERS[name])
        self.scheduler = scheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        return self

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

    def noise_predictor(self, precision: torch.dtype, compiled: bool = False) -> PredictNoise:
        """The U-Net as a function of (x_t, t) with t in 1..T, under autocast, float32 in and out, whatever it predicts.

        Args:
            precision: autocast.
            compiled: by torch.compile, at its first call.

        Raises:
            ValueError: a prediction type that is not supported.
        """
        unet, schedule = freeze(self.unet), self.schedule()
        dtype = floating_type(unet)
        kind = self.scheduler.config["prediction_type"]
        channels, forward = unet.config.in_channels, self._forward(compiled)
        to_eps(torch.zeros(1, 1), torch.zeros(1, 1), 1, schedule, kind)  # an unknown kind is refused here

        def predict_noise(x: Tensor, t: int) -> Prediction:
            with autocast(x.device, precision):
                output = forward(x.to(dtype), torch.full((len(x),), t - 1, device=x.device)).to(x.dtype)
            share = (output[:, channels:] + 1.0) / 2.0 if output.shape[1] == 2 * channels else None
            return Prediction(to_eps(output[:, :channels], x, t, schedule, kind), share)

        return predict_noise

    def wants_compiling(self, choice: str, passes: int) -> bool:
        """Whether to compile the U-Net, by `auto` for so many forward passes of one image or what costs as much."""
        return wants_compiling(choice, self.device, lambda: passes * forward_flop(self.unet, self.image_shape()))

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's images."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def _forward(self, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """The U-Net on (x_t, timesteps); compiled once, whatever is drawn with it."""
        if not compiled:
            return lambda x, timesteps: self.unet(x, timesteps).sample
        if self._compiled is None or self._compiled[0] is not self.unet:
            self._compiled = (self.unet, compiled_unet(self.unet))
        return self._compiled[1]

    def __call__(
        self,
        num_samples: int = 1,
        batch_size: BatchSize = 16,
        seed: int = 0,
        guidance: ClassifierGuidance | None = None,
        *,
        first_sample: int = 0,
        start: str = "auto",
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        precision: torch.dtype | str = torch.float32,
        compile: Compile = "off",
        trace: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> GuidedOutput:
        """Draw samples.

        Args:
            num_samples: N.
            batch_size: samples at once, or `auto`; halved where memory runs out. Changes speed, and in float32 never
                the samples; in half precision they are the same bytes for the same batch size.
            seed: sample i depends on (seed, first_sample + i) alone.
            guidance: None samples the plain DDPM.
            first_sample: global index of the first sample, to draw a run in parts.
            start: `standard_normal`, `data_mean`, or `auto`: data_mean where the folder holds it.
            num_inference_steps: steps taken, 1..T; None takes all. `use_sampler` sets samplers that need few.
            eta: for DDIM, share of the ancestral sampler's noise, in [0, 1].
            precision: autocast of the U-Net, a dtype or a name such as `auto`; x_t, the gradient and the stabilizer
                stay in float32.
            compile: the U-Net by torch.compile: `on`, or `auto`, on a GPU where so many samples are worth it.
            trace: record gradient norms and cosines, log-probabilities and clipped pixels of each step (`Trace`).
            on_step: called after each step with the number done, of num_samples times the steps; instead of a bar.

        Raises:
            ValueError: a setting or a scheduler that is not supported, a classifier that does not fit.
            DataError: a single sample does not fit into the memory.
        """
        num_samples = whole_number("num_samples", num_samples, least=1)
        first_sample = whole_number("first_sample", first_sample)
        self.sampler(eta)  # a scheduler that is not supported is refused first
        timesteps, data_mean, shape = self.timesteps(num_inference_steps), self.start_mean(start), self.image_shape()
        schedule, samples = self.schedule(), range(first_sample, first_sample + num_samples)

        def begin(places: Sequence[int]) -> Tensor:
            drawn = [samples[place] for place in places]
            return start_samples(schedule, seed, drawn, shape, self.device, data_mean, timesteps[0])

        return self.denoise(
            begin,
            samples,
            timesteps,
            batch_size=batch_size,
            seed=seed,
            guidance=guidance,
            eta=eta,
            precision=precision,
            compile=compile,
            trace=trace,
            on_step=on_step,
        )

    def denoise(
        self,
        start: Start,
        samples: Sequence[int],
        timesteps: list[int],
        *,
        batch_size: BatchSize = 16,
        seed: int = 0,
        guidance: ClassifierGuidance | None = None,
        eta: float = 0.0,
        precision: torch.dtype | str = torch.float32,
        compile: Compile = "off",
        trace: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> GuidedOutput:
        """The trajectories of a call from any start, such as noised images, whose chain begins below T.

        Args:
            start: gives x at the first timestep.
            samples: global index of each sample, on which its noise depends.
            timesteps: falling, some of 1..T (`timesteps`).
            batch_size, seed, guidance, eta, precision, compile, trace, on_step: as of a call.

        Raises:
            ValueError, DataError: as a call.
        """
        if batch_size != "auto":
            batch_size = whole_number("batch_size", batch_size, least=1)
        if trace and (guidance is None or guidance.scale == 0):
            raise ValueError("trace: needs guidance with a scale above 0")
        sampler, shape, count = self.sampler(eta), self._prepare(guidance), len(samples)
        began = time.perf_counter()
        with self._running(guidance, on_step, len(timesteps) * count) as report:
            dtype = _dtype_of(precision, self.device)
            compiled = self.wants_compiling(compile, count * len(timesteps) * _forwards(guidance))
            batches = _Batches(
                self.noise_predictor(dtype, compiled),
                sampler,
                timesteps,
                guidance,
                seed,
                samples,
                start,
                trace,
                report,
                # Kernels of half precision round by the shape of the batch, compiled ones are made for it.
                one_shape=compiled or {dtype, floating_type(self.unet)} != {torch.float32},
            )
            drawn = in_batches(count, min(first_batch(batch_size, self.device, shape[1] * shape[2]), count), batches)
        return _output(drawn, time.perf_counter() - began, Trace.join(batches.traces) if trace else None)

    @contextlib.contextmanager
    def _running(
        self, guidance: ClassifierGuidance | None, on_step: Callable[[int], None] | None, total: int
    ) -> Iterator[Callable[[int], None]]:
        """The U-Net frozen, gradients possible; gives what is called with the number of steps done."""
        bar = None if on_step is not None else self.progress_bar(total=total)
        try:
            with torch.inference_mode(False), frozen(self.unet):
                yield on_step or (lambda done: bar.update(done - bar.n))
        finally:
            if bar is not None:
                bar.close()
            if guidance is not None:
                guidance.reset()  # its state holds the last batch's gradients

    def _prepare(self, guidance: ClassifierGuidance | None) -> tuple[int, int, int]:
        """Try the classifier on the model's images, and set the U-Net's checkpointing; returns (C, H, W)."""
        if self.unet.config.get("num_class_embeds") or self.unet.config.get("class_embed_type"):
            raise ValueError("the U-Net is conditional on a class; the guidance needs an unconditional one")
        shape = self.image_shape()
        if guidance is not None:
            guidance.to(self.device).check(torch.empty(1, *shape, device=self.device))
        if guidance is not None and guidance.grad_mode == "checkpoint":
            self.unet.enable_gradient_checkpointing()
        elif getattr(self.unet, "is_gradient_checkpointing", False):
            self.unet.disable_gradient_checkpointing()
        return shape

    def start_mean(self, start: str) -> Tensor | None:
        if start not in ("auto", *STARTS):
            raise ValueError(f"start: {start!r} is unknown; allowed: auto, {', '.join(STARTS)}")
        if start == "data_mean" and self.data_mean is None:
            raise ValueError("start: data_mean needs the file data_mean.npy beside the pipeline's model_index.json")
        if start == "standard_normal" or self.data_mean is None:
            return None
        shape = self.image_shape()
        if tuple(self.data_mean.shape) != shape:
            raise ValueError(f"data_mean: has the shape {tuple(self.data_mean.shape)}, the model's images {shape}")
        if not bool((self.data_mean.abs() <= 1.0).all()):
            raise ValueError("data_mean: holds values outside [-1, 1]; is it in 0..255?")
        return self.data_mean.float()


def _forwards(guidance: ClassifierGuidance | None) -> int:
    """What a step costs, in forward passes: a gradient through the U-Net is worth two."""
    return 3 if guidance is not None and guidance.input == "pred_x0" and guidance.grad_mode != "no_jacobian" else 1


def _dtype_of(precision: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(precision, torch.dtype):
        return precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is unknown; allowed: a dtype or {', '.join(PRECISIONS)}")
    return resolve_precision(precision, device)


def _output(drawn: list[tuple[Tensor, Tensor]], seconds: float, trace: Trace | None) -> GuidedOutput:
    """What the batches gave, joined."""
    samples = torch.cat([x for x, _ in drawn])
    shown = to_uint8(samples) if samples.shape[1] in (1, 3) else []
    return GuidedOutput(
        images=[Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in shown],
        samples=samples,
        nonfinite=torch.cat([nonfinite for _, nonfinite in drawn]),
        seconds=seconds,
        trace=trace,
    )
