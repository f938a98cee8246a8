"""Guided sampling: a shard of the workflow, or images of anybody's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import PUBLISHED_STEPS, Compile, ObjectiveStep, SampleStep
from nrcg.data.arrays import to_uint8
from nrcg.data.pictures import sample_grid, save_png
from nrcg.data.shards import write_shard
from nrcg.devices import device_name, floating_type, peak_memory_mib
from nrcg.errors import ConfigError
from nrcg.files import weights_sha256
from nrcg.guidance.building import build_guidance
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.trace import Trace
from nrcg.layout import format_scale, trace_of
from nrcg.pipeline.progress import Progress
from nrcg.provenance import versions

GRID_SAMPLES = 256
"""Samples in the grid of `sample_images`, as many as the paper's fig. 9 shows."""


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn: the arguments of `GuidedDDPMPipeline.__call__` of the same names."""

    num_samples: int
    batch_size: int | str
    seed: int
    start: str
    precision: torch.dtype
    compile: Compile = "off"
    first_sample: int = 0
    num_inference_steps: int | None = None
    eta: float = 0.0
    trace: bool = False
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Of a model of text: `prompt` and its like."""

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        own = vars(self) | dict(self.conditions)
        return {name: value for name, value in own.items() if name != "conditions"}


@dataclass(frozen=True)
class Drawn:
    """What was drawn and written.

    Attributes:
        images: (N, H, W, C) uint8.
        record: What made them, as it stands beside the array.
        trace: What the guidance did in each step, where asked for.
    """

    images: np.ndarray
    record: dict[str, Any]
    trace: Trace | None = None


def draw(
    pipe: GuidedDDPMPipeline,
    guidance: ClassifierGuidance | None,
    drawing: Drawing,
    *,
    label: str,
    out: Path | None = None,
    record: Mapping[str, Any] | None = None,
) -> Drawn:
    """Draw samples, and write them with their record.

    Args:
        pipe: The diffusion model on its device.
        guidance: None samples without guidance.
        drawing: How they are drawn.
        label: What the progress says.
        out: File of the array, its record and trace beside it; None writes nothing.
        record: What the record says beside the drawing.
    """
    device = pipe.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = len(pipe.timesteps(drawing.num_inference_steps))
    with Progress(label, steps * drawing.num_samples, "step") as bar:
        found = pipe(guidance=guidance, on_step=bar.set, **drawing.arguments())
    images = to_uint8(found.samples)
    whole = {
        **(record or {}),
        **{name: getattr(drawing, name) for name in ("first_sample", "num_samples", "seed", "start")},
        "num_inference_steps": drawing.num_inference_steps,
        "precision": _precision_of(pipe, drawing.precision),
        "device": device_name(device),
        "nonfinite": int(found.nonfinite.sum()),
        "seconds": found.seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "versions": versions(),
    }
    if out is not None:
        if found.trace is not None:
            found.trace.save(trace_of(out))
        whole = write_shard(out, images, whole, None if found.trace is None else trace_of(out))
    return Drawn(images, whole, found.trace)


def _precision_of(pipe: GuidedDDPMPipeline, autocast: torch.dtype) -> str:
    weights = floating_type(pipe.unet)
    name = str(autocast if weights == torch.float32 else weights).removeprefix("torch.")
    return name if weights == torch.float32 else f"{name} weights"


def method_guidance(
    settings: SampleStep | ObjectiveStep, classifier: Any, scale: float, pipe: GuidedDDPMPipeline
) -> ClassifierGuidance:
    """Guidance as a method of the configuration asks for it, for a pipeline that uses the method's sampler."""
    method = settings.guidance
    steps = len(pipe.timesteps(method.sampler.count(pipe.num_train_steps)))
    return build_guidance(
        method,
        classifier,
        class_index(classifier.classes, settings.target),
        scale,
        num_steps=PUBLISHED_STEPS if settings.sampling.betas_per_step else steps,
        clip_pred_x0=settings.sampling.clip_pred_x0,
    )


def method_drawing(
    settings: SampleStep | ObjectiveStep, pipe: GuidedDDPMPipeline, precision: torch.dtype, **others: Any
) -> Drawing:
    """How a method's samples are drawn by a model; `others` are further fields of Drawing."""
    sampling, sampler = settings.sampling, settings.guidance.sampler
    return Drawing(
        batch_size=sampling.batch_size,
        seed=sampling.seed,
        start=sampling.start,
        precision=precision,
        compile=settings.compile,
        num_inference_steps=sampler.count(pipe.num_train_steps),
        eta=sampler.eta,
        **others,
    )


def sample_shard(
    settings: SampleStep,
    *,
    scale: float,
    shard: int,
    ddpm: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
    classifier: Path | None = None,
) -> Drawn:
    """One shard of the samples of a method at a scale (algorithm 1).

    Args:
        settings: The method's settings.
        scale: Guidance scale s of eq. 1.
        shard: Number of the shard, from 0.
        ddpm: Folder of the diffusion model.
        classifier: Folder of the guiding classifier; None where nothing guides.
        out: File of the array, its record beside it.
        device: Device that computes.
        precision: Autocast of the U-Net.

    Raises:
        ConfigError: The shard is past the last, or the method's classifier is missing.
    """
    method, config = settings.guidance, settings.sampling
    first = shard * config.shard_size
    count = min(config.shard_size, config.num_samples - first)
    if count < 1:
        raise ConfigError(f"--shard: {shard} is past the last of {config.num_samples} samples")
    pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device).use_sampler(method.sampler.name)
    pipe.with_weights(settings.unet_weights)
    guidance, weights = None, {"ddpm": weights_sha256(ddpm)}
    if method.classifier is not None:
        if classifier is None:
            raise ConfigError(f"--classifier: missing; method {settings.method} is guided by {method.classifier}")
        guidance = method_guidance(settings, open_classifier(classifier), scale, pipe)
        weights["classifier"] = weights_sha256(classifier)
    label = f"sample {settings.method} scale {format_scale(scale)}"
    trace = config.trace and guidance is not None and scale > 0
    with tracking.run(
        settings.experiment,
        f"{label} shard {shard}",
        kind="shard",
        params=settings.model_dump() | {"scale": scale, "shard": shard, "weights_sha256": weights},
        tags={"method": settings.method},
        deferred=True,
    ) as run:
        drawn = draw(
            pipe,
            guidance,
            method_drawing(settings, pipe, precision, num_samples=count, first_sample=first, trace=trace),
            label=label,
            out=out,
            record={
                "experiment": settings.experiment,
                "method": settings.method,
                "scale": scale,
                "shard": shard,
                "settings": settings.fingerprint(),
                "weights_sha256": weights,
            },
        )
        numbers = {key: drawn.record[key] for key in ("seconds", "nonfinite", "peak_memory_mib")}
        run.log_metrics(numbers | {"images_per_second": count / drawn.record["seconds"]})
    return drawn


def sample_images(
    pipe: GuidedDDPMPipeline,
    guidance: ClassifierGuidance | None,
    drawing: Drawing,
    *,
    out: Path,
    record: Mapping[str, Any] | None = None,
) -> Drawn:
    """Images of anybody's model: samples.npy with its record, a PNG each, and a grid.

    Args:
        pipe, guidance, drawing, record: As for `draw`.
        out: Folder to write to.
    """
    drawn = draw(pipe, guidance, drawing, label="sample", out=out / "samples.npy", record=record)
    if drawn.images.shape[-1] in (1, 3):  # others are no pictures
        for index, image in enumerate(drawn.images):
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out / f"{index:05d}.png")
        shown = drawn.images[:GRID_SAMPLES]
        save_png(out / "grid.png", sample_grid(shown, max(1, round(len(shown) ** 0.5))))
    return drawn
