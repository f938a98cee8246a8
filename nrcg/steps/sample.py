"""Guided sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg.config import SampleStep
from nrcg.devices import device_name, peak_memory_mib
from nrcg.provenance import versions

if TYPE_CHECKING:
    import torch


def method_guidance(settings: SampleStep, classifier: Any, scale: float, pipe: Any) -> Any:
    """Guidance as a method of the configuration asks for it, for a pipeline that uses the method's sampler."""
    from nrcg.classifiers.logits import class_index
    from nrcg.guidance import scales, stabilizers
    from nrcg.guidance.guidance import ClassifierGuidance

    method = settings.guidance
    return ClassifierGuidance(
        classifier,
        class_index(classifier.classes, settings.target),
        scale=scales.from_config(method.scale_schedule, scale),
        input=method.input,
        stabilizer=stabilizers.from_config(method.stabilizer, len(pipe.timesteps(method.sampler.steps))),
        clip_pred_x0=settings.sampling.clip_pred_x0,
        grad_mode=method.grad_mode,
        every_k=method.every_k,
        skip_above=method.skip_above,
    )


def draw_samples(
    path: str | Path,
    pipe: Any,
    guidance: Any,
    device: torch.device,
    precision: torch.dtype,
    *,
    num_samples: int,
    first_sample: int,
    batch_size: int | str,
    seed: int,
    start: str,
    label: str,
    record: dict,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    trace: bool = False,
) -> Any:
    """Draw samples, write them as uint8 (N, H, W, C) to `path` and their record beside it; returns them."""
    import torch

    from nrcg.data.arrays import to_uint8
    from nrcg.files import atomic_save_array, sha256_file, write_record
    from nrcg.pipeline.progress import Progress

    path = Path(path)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Progress(label, len(pipe.timesteps(num_inference_steps)) * num_samples, "step") as bar:
        out = pipe(
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            guidance=guidance,
            first_sample=first_sample,
            start=start,
            num_inference_steps=num_inference_steps,
            eta=eta,
            precision=precision,
            trace=trace,
            on_step=bar.set,
        )
    traced = {}
    if out.trace is not None:
        out.trace.save(path.with_suffix(".trace.npz"))
        traced = {"trace_sha256": sha256_file(path.with_suffix(".trace.npz"))}
    images = to_uint8(out.samples)
    atomic_save_array(path, images)
    record = record | {
        "first_sample": first_sample,
        "num_samples": num_samples,
        "seed": seed,
        "start": start,
        "num_inference_steps": num_inference_steps,
        "precision": str(precision).removeprefix("torch."),
        "device": device_name(device),
        "nonfinite": int(out.nonfinite.sum()),
        "seconds": out.seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "sha256": sha256_file(path),
        **traced,
        "versions": versions(),
    }
    write_record(path.with_suffix(".json"), record)
    return images
