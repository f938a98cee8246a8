"""Guided sampling (algorithm 1) with any pipeline of diffusers that has a U-Net and a scheduler."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.config import PRECISIONS, STARTS, Compile
from nrcg.data.arrays import to_uint8
from nrcg.devices import autocast, floating_type, freeze, frozen, resolve_precision
from nrcg.diffusion.compiling import Compiled, compiled_unet, forward_flop, resolve_compile
from nrcg.diffusion.objectives import Prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import whole_number
from nrcg.files import atomic_write_text
from nrcg.guidance.chains import Chain, chain_of, scheduler_for, trained_schedule
from nrcg.guidance.guidance import ClassifierGuidance, PredictNoise
from nrcg.guidance.levels import Network, Trained
from nrcg.guidance.samplers import Sampler
from nrcg.guidance.sampling import guided_sample, start_samples
from nrcg.guidance.trace import Trace, TraceRecorder


@dataclass
class GuidedOutput(BaseOutput):
    """What a pipeline call gives.

    Attributes:
        images: PIL images; none where the samples have neither one nor three channels.
        samples: (N, C, H, W) float32 in [-1, 1].
        latents: (N, c, h, w) float32 that they were decoded from; None where the model draws pixels.
        nonfinite: (N,) bool, samples that turned non-finite, which stand as they were at the step before; or whose
            decoding did, which are grey.
        seconds: wall time of the sampling alone.
        trace: what the guidance did in each step, where asked for.
    """

    images: list[Image.Image]
    samples: Tensor
    nonfinite: Tensor
    seconds: float
    trace: Trace | None = None
    latents: Tensor | None = None


Start = Callable[[Sequence[int]], Tensor]
"""Places of samples in a run to their x at its first timestep, (B, C, H, W) float32."""


@dataclass
class _Batches:
    """Draws a call's samples, batch by batch."""

    predict_noise: PredictNoise
    chain: Chain
    guidance: ClassifierGuidance | None
    seed: int
    samples: Sequence[int]
    start: Start
    trace: bool
    report: Callable[[int], None]
    finish: Callable[[Tensor], Tensor]  # what is drawn, to images in [-1, 1]
    one_shape: bool  # the last batch is filled up with copies of the last sample
    traces: list[Trace] = field(default_factory=list)
    whole: int = 0  # samples of the last batch that fitted into the memory

    def __call__(self, batch: range) -> tuple[Tensor, Tensor, Tensor]:
        """Samples (B, C, H, W) in [-1, 1], what they were made of, and which are not finite."""
        count = max(len(batch), self.whole) if self.one_shape else len(batch)
        places = [min(place, len(self.samples) - 1) for place in range(batch.start, batch.start + count)]
        steps = self.chain.timesteps
        if self.guidance is not None:
            self.guidance.select(places)
        recorder = TraceRecorder() if self.trace else None
        done = itertools.count(batch.start * len(steps) + len(batch), len(batch))
        x, nonfinite = guided_sample(
            self.start(places),
            self.predict_noise,
            self.chain.sampler,
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
        x, nonfinite = x[: len(batch)], nonfinite[: len(batch)]
        images = self.finish(x)
        broken = ~images.isfinite().flatten(1).all(dim=1)  # a decoder of half precision may overflow
        images = torch.where(broken.reshape(-1, 1, 1, 1), 0.0, images)
        return images.cpu(), x.cpu(), (nonfinite | broken).cpu()


class GuidedSampling:
    """What a pipeline of diffusers needs to draw with classifier guidance and a seed for each sample.

    Mixed into a DiffusionPipeline with `unet` and `scheduler`. Called with guidance=None it is the plain model. While
    it draws, the networks are in eval mode with frozen parameters; what they had before is given back.
    """

    unet: nn.Module
    scheduler: Any
    device: torch.device
    data_mean: Tensor | None = None
    takes_prompt = False
    default_steps: int | None = None  # of the shell; None: all
    _compiled: tuple[object, Compiled, Callable[..., Tensor]] | None = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers', as a folder of the plain pipeline: whoever opens it needs no nrcg."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "model_index.json"
        index = json.loads(path.read_text())
        index["_class_name"] = self.plain_class().__name__
        atomic_write_text(path, json.dumps(index, indent=2) + "\n")

    @classmethod
    def plain_class(cls) -> type:
        """The pipeline of diffusers that this one is."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))

    def with_weights(self, dtype: torch.dtype | str | None) -> Any:
        """The U-Net's weights in another type; None: as they are. For speed instead of autocast, at half the memory."""
        if dtype is not None:
            # Past diffusers' own `to`, which warns of it whatever the model.
            torch.nn.Module.to(self.unet, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return self

    def use_sampler(self, name: str) -> Any:
        """Exchange the scheduler for another with the same betas: `ddpm`, `ddim`, `dpmpp` (DPM-Solver++ 2M), `euler`,
        `heun`, `unipc`, or `model`, which leaves it as it is.

        Raises:
            ValueError: another name, or a model of no betas.
        """
        self.scheduler = scheduler_for(name, self.scheduler)
        return self

    @property
    def num_train_steps(self) -> int:
        """T of the training."""
        return self.scheduler.config["num_train_timesteps"]

    def schedule(self) -> Schedule:
        """abar of the training. Raises ValueError: the scheduler knows no betas, such as one of flow matching."""
        return trained_schedule(self.scheduler)

    def chain(self, num_inference_steps: int | None = None, eta: float = 0.0) -> Chain:
        """How the scheduler goes from noise to images, in so many of the T steps; None takes all.

        Args:
            eta: for DDIM, share of the ancestral sampler's noise, in [0, 1].

        Raises:
            ValueError: a scheduler or a setting of it that is not supported, or steps that are not in 1..T.
        """
        return chain_of(self.scheduler, num_inference_steps, eta)

    def sampler(self, eta: float = 0.0) -> Sampler:
        """The scheduler's mathematics, with a place for the guidance, for all steps (`chain`)."""
        return self.chain(eta=eta).sampler

    def timesteps(self, num_inference_steps: int | None = None) -> list[int]:
        """The levels t that are stepped from, falling (`chain`)."""
        return self.chain(num_inference_steps).timesteps

    def noise_predictor(
        self, precision: torch.dtype, compiled: Compiled = "off", network: Network | None = None
    ) -> PredictNoise:
        """The U-Net as a function of (x_t, t), under autocast, float32 in and out, whatever it predicts.

        Args:
            precision: autocast.
            compiled: by torch.compile, at its first call; `graphs`: as CUDA graphs.
            network: how it is asked; None: at the levels 1..T of the training.

        Raises:
            ValueError: a prediction type that is not supported.
        """
        unet = freeze(self.unet)
        dtype, forward = floating_type(unet), self._forward(compiled)
        network = network or Trained(self.schedule(), self.scheduler.config["prediction_type"])

        def predict_noise(x: Tensor, t: int) -> Prediction:
            given, timesteps = network.ask(x, t)
            with autocast(x.device, precision):
                output = forward(given.to(dtype), timesteps).to(x.dtype)
            return network.read(output, x, t)

        return predict_noise

    def resolve_compile(self, choice: str, passes: int) -> Compiled:
        """How to compile the U-Net, by `auto` for so many forward passes of one image or what costs as much."""
        return resolve_compile(choice, self.device, lambda: passes * self._flop())

    def _flop(self) -> float:
        """Of one image through the U-Net."""
        return forward_flop(self.unet, self.drawn_shape(), *self._extra_inputs())

    def _extra_inputs(self) -> tuple[Tensor, ...]:
        """What the U-Net takes beside x_t and the timesteps, for one image."""
        return ()

    def drawn_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the U-Net denoises."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("the U-Net's config.json names no sample_size, the height and width of what it draws")
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the model's images."""
        return self.drawn_shape()

    def decoder(self) -> nn.Module | None:
        """What makes images of what is drawn; None: they are images."""
        return None

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], of what is drawn; differentiable."""
        return x

    def _finish(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], of what was drawn."""
        with torch.no_grad():
            return self.decode(x).clamp(-1.0, 1.0)

    def _forward(self, compiled: Compiled) -> Callable[[Tensor, Tensor], Tensor]:
        """The U-Net on (x_t, timesteps); compiled once, whatever is drawn with it."""
        return self._network(compiled)

    def _network(self, compiled: Compiled) -> Callable[..., Tensor]:
        """The U-Net itself."""
        if compiled == "off":
            return compiled_unet(self.unet, compiled)
        if self._compiled is None or self._compiled[0] is not self.unet or self._compiled[1] != compiled:
            self._compiled = (self.unet, compiled, compiled_unet(self.unet, compiled))
        return self._compiled[2]

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
        prompt: str | None = None,
    ) -> GuidedOutput:
        """Draw samples.

        Args:
            num_samples: N.
            batch_size: samples at once, or `auto`; halved where memory runs out. Changes speed, and in float32 never
                the samples; in half precision they are the same bytes for the same batch size.
            seed: sample i depends on (seed, first_sample + i) alone.
            guidance: None samples the plain model.
            first_sample: global index of the first sample, to draw a run in parts.
            start: `standard_normal`, `data_mean`, or `auto`: data_mean where the folder holds it.
            num_inference_steps: steps taken, 1..T; None takes all. `use_sampler` sets samplers that need few.
            eta: for DDIM, share of the ancestral sampler's noise, in [0, 1].
            precision: autocast of the U-Net, a dtype or a name such as `auto`; x_t, the gradient and the stabilizer
                stay in float32.
            compile: the U-Net by torch.compile: `on`, or `auto`, on a GPU where so many samples are worth it.
            trace: record gradient norms and cosines, log-probabilities and clipped pixels of each step (`Trace`).
            on_step: called after each step with the number done, of num_samples times the steps; instead of a bar.
            prompt: for models of text alone (`GuidedStableDiffusionPipeline`).

        Raises:
            ValueError: a setting or a scheduler that is not supported, a classifier that does not fit.
            DataError: a single sample does not fit into the memory.
        """
        if prompt is not None:
            raise ValueError(f"prompt: {type(self).__name__} is a model without text; leave it out")
        num_samples = whole_number("num_samples", num_samples, least=1)
        first_sample = whole_number("first_sample", first_sample)
        chain = self.chain(num_inference_steps, eta)  # a scheduler that is not supported is refused first
        data_mean, shape = self.start_mean(start), self.drawn_shape()
        samples = range(first_sample, first_sample + num_samples)

        def begin(places: Sequence[int]) -> Tensor:
            drawn = [samples[place] for place in places]
            x = start_samples(chain.schedule, seed, drawn, shape, self.device, data_mean, chain.timesteps[0])
            return x if data_mean is not None else chain.start_scale * x

        return self.denoise(
            begin,
            samples,
            chain,
            batch_size=batch_size,
            seed=seed,
            guidance=guidance,
            precision=precision,
            compile=compile,
            trace=trace,
            on_step=on_step,
        )

    def denoise(
        self,
        start: Start,
        samples: Sequence[int],
        chain: Chain,
        *,
        batch_size: BatchSize = 16,
        seed: int = 0,
        guidance: ClassifierGuidance | None = None,
        precision: torch.dtype | str = torch.float32,
        compile: Compile = "off",
        trace: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> GuidedOutput:
        """The trajectories of a call from any start, such as noised images, whose chain begins below T.

        Args:
            start: gives x at the first timestep.
            samples: global index of each sample, on which its noise depends.
            chain: what is stepped through; its timesteps may be the last ones alone.
            batch_size, seed, guidance, precision, compile, trace, on_step: as of a call.

        Raises:
            ValueError, DataError: as a call.
        """
        if batch_size != "auto":
            batch_size = whole_number("batch_size", batch_size, least=1)
        if trace and (guidance is None or guidance.scale == 0):
            raise ValueError("trace: needs guidance with a scale above 0")
        shape, count, steps = self.image_shape(), len(samples), len(chain.timesteps)
        began = time.perf_counter()
        with self._running(guidance, on_step, steps * count) as report:
            self._prepare(guidance)
            dtype = _dtype_of(precision, self.device)
            compiled = self.resolve_compile(compile, count * steps * _forwards(guidance))
            batches = _Batches(
                self.noise_predictor(dtype, compiled, chain.network),
                chain,
                guidance,
                seed,
                samples,
                start,
                trace,
                report,
                self._finish,
                # Kernels of half precision round by the shape of the batch, compiled ones are made for it.
                one_shape=compiled != "off" or {dtype, floating_type(self.unet)} != {torch.float32},
            )
            drawn = in_batches(count, min(first_batch(batch_size, self.device, shape[1] * shape[2]), count), batches)
        seconds, traced = time.perf_counter() - began, Trace.join(batches.traces) if trace else None
        return _output(drawn, seconds, traced, self.decoder() is not None)

    @contextlib.contextmanager
    def _running(
        self, guidance: ClassifierGuidance | None, on_step: Callable[[int], None] | None, total: int
    ) -> Iterator[Callable[[int], None]]:
        """The networks frozen, gradients possible; gives what is called with the number of steps done."""
        bar = None if on_step is not None else self.progress_bar(total=total)  # type: ignore[attr-defined]
        try:
            with torch.inference_mode(False), frozen(self.unet, self.decoder()):
                if guidance is not None and self.decoder() is not None:
                    guidance.decode = self.decode
                yield on_step or (lambda done: bar.update(done - bar.n))
        finally:
            if bar is not None:
                bar.close()
            if guidance is not None:
                guidance.reset()  # its state holds the last batch's gradients
                guidance.decode = None

    def _prepare(self, guidance: ClassifierGuidance | None) -> None:
        """Try the classifier on what the model draws, and set the U-Net's checkpointing."""
        if self.unet.config.get("num_class_embeds") or self.unet.config.get("class_embed_type"):
            raise ValueError("the U-Net is conditional on a class; the guidance needs an unconditional one")
        if guidance is not None:
            guidance.to(self.device).check(torch.zeros(1, *self.drawn_shape(), device=self.device))
        if guidance is not None and guidance.grad_mode == "checkpoint":
            self.unet.enable_gradient_checkpointing()
        elif getattr(self.unet, "is_gradient_checkpointing", False):
            self.unet.disable_gradient_checkpointing()

    def start_mean(self, start: str) -> Tensor | None:
        """The mean training image that a trajectory starts around, (C, H, W); None: it starts from noise.

        Raises:
            ValueError: another start, or no such image.
        """
        if start not in ("auto", *STARTS):
            raise ValueError(f"start: {start!r} is unknown; allowed: auto, {', '.join(STARTS)}")
        if start == "data_mean" and self.data_mean is None:
            raise ValueError("start: data_mean needs the file data_mean.npy beside the pipeline's model_index.json")
        if start == "standard_normal" or self.data_mean is None:
            return None
        shape = self.drawn_shape()
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


def _output(
    drawn: list[tuple[Tensor, Tensor, Tensor]], seconds: float, trace: Trace | None, latent: bool
) -> GuidedOutput:
    """What the batches gave, joined."""
    samples, drawn_from, nonfinite = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    shown = to_uint8(samples) if samples.shape[1] in (1, 3) else []
    return GuidedOutput(
        images=[Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in shown],
        samples=samples,
        nonfinite=nonfinite,
        seconds=seconds,
        trace=trace,
        latents=drawn_from if latent else None,
    )
