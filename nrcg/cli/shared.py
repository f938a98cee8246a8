"""What the verbs share: their settings, device, data and samples, what they record, and types of arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nrcg import __version__
from nrcg.config import SampleStep, StepSettings, checked_device, read_step_settings
from nrcg.errors import ConfigError

if TYPE_CHECKING:
    import torch

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a module declares its verbs."""


def add_verb(
    verbs: Verbs, name: str, verb: Callable, *, step: bool = False, compute: bool = False
) -> argparse.ArgumentParser:
    """The parser of one verb, explained by the docstring of its function.

    Args:
        step: it is a step of the pipeline: --config and --experiment.
        compute: it computes with torch: --device and --threads.
    """
    sub = verbs.add_parser(name, help=(verb.__doc__ or "").splitlines()[0], description=verb.__doc__)
    sub.set_defaults(verb=verb)
    if step:
        sub.add_argument("--config", required=True, help="config.yaml, or a step's settings file")
        sub.add_argument("--experiment", help="which experiment of config.yaml")
    if compute:
        sub.add_argument("--device", type=device_flag, help="auto, cpu, cuda, cuda:N; default: the config's")
        sub.add_argument("--threads", type=positive, help="CPU threads")
    return sub


def device_flag(text: str) -> str:
    """Type of an argument: auto, cpu, cuda or cuda:N."""
    try:
        return checked_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Type of an argument: a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return int(text)


def positive_or_auto(text: str) -> int | str:
    """Type of an argument: a whole number >= 1, or auto."""
    return text if text == "auto" else positive(text)


def positive_or_zero(text: str) -> int:
    """Type of an argument: a whole number >= 0."""
    return 0 if text == "0" else positive(text)


def nonnegative(text: str) -> float:
    """Type of an argument: a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def read_settings(arguments: argparse.Namespace, step: str, part: str | None = None) -> Any:
    """The settings of a step, of the experiment and file that --experiment and --config name."""
    return read_step_settings(arguments.config, step, arguments.experiment, part)


def checked_data(folder: str) -> dict:
    """A data set's manifest, after its arrays were compared with its checksums. Unchanged files are not read again."""
    from nrcg.datasets import load_manifest, verify
    from nrcg.integrity import Sums

    verify(folder, sha256=Sums().sha256)
    return load_manifest(folder)


def choose_device(arguments: argparse.Namespace, settings: StepSettings | None) -> tuple[torch.device, torch.dtype]:
    """Device and precision: the flags', else the settings'. Also sets the number of threads."""
    import torch

    from nrcg.diffusion import resolve_device
    from nrcg.distributed import launched

    if launched():  # the processes of a training share the threads
        threads = arguments.threads or os.cpu_count() or 1
        torch.set_num_threads(max(threads // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), 1))
    elif arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device or getattr(settings, "device", "auto"))
    if device.type == "cuda" and device.index is None and os.environ.get("NRCG_WORKFLOW") and not launched():
        from nrcg.devices import lease_cuda_device

        device = torch.device("cuda", lease_cuda_device(cuda_uuids()))
    return device, choose_precision(arguments, settings, device)


def choose_precision(arguments: argparse.Namespace, settings: StepSettings | None, device: torch.device) -> torch.dtype:
    """Precision: the flag's, else the settings', else float32."""
    from nrcg.diffusion import resolve_precision

    precision = getattr(arguments, "precision", None) or getattr(settings, "precision", "float32")
    return resolve_precision(precision, device)


def cuda_uuids() -> list[str]:
    """The visible GPUs' names, the same in every process whatever each of them sees."""
    import torch

    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def open_pipeline(
    arguments: argparse.Namespace, settings: StepSettings | None
) -> tuple[Any, torch.device, torch.dtype]:
    """The pipeline of --ddpm on its device, that device, and the precision."""
    from diffusers.utils import logging

    from nrcg.sampling import GuidedDDPMPipeline

    logging.disable_progress_bar()  # a bar for two files
    device, precision = choose_device(arguments, settings)
    if arguments.ddpm is None:
        raise ConfigError("--ddpm: missing; give the folder of the diffusion model")
    return GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device), device, precision


def method_guidance(settings: SampleStep, classifier: Any, scale: float, pipe: Any) -> Any:
    """Guidance as a method of the configuration asks for it, for a pipeline that uses the method's sampler."""
    from nrcg import schedules, stabilizers
    from nrcg.classifiers import class_index
    from nrcg.guidance import ClassifierGuidance

    method = settings.guidance
    return ClassifierGuidance(
        classifier,
        class_index(classifier.classes, settings.target),
        scale=schedules.from_config(method.scale_schedule, scale),
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

    from nrcg.datasets import to_uint8
    from nrcg.files import atomic_save_array, sha256_file, write_record
    from nrcg.progress import Progress

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
        "peak_memory_mib": _peak_memory_mib(device),
        "sha256": sha256_file(path),
        **traced,
        "versions": versions(),
    }
    write_record(path.with_suffix(".json"), record)
    return images


def log_dataset(run: Any, manifest: dict, folder: str | Path, split: str, context: str) -> None:
    """A split as an input of the tracking run."""
    record, size = manifest["splits"][split], manifest["image_size"]
    run.log_dataset(
        name=f"{manifest['name']}/{split}",
        path=Path(folder) / split,
        sha256=record["sha256"]["images"],
        shape=(record["num_images"], size, size, manifest["channels"]),
        classes=manifest["classes"],
        context=context,
    )


def data_tags(manifest: dict) -> dict[str, str]:
    """A data set as tags of a tracking run."""
    return {"dataset": manifest["name"], "dataset_sha256": manifest["splits"]["train"]["sha256"]["images"]}


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "torchvision", "numpy")
    return {"nrcg": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    """The GPU's model, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the CUDA allocator, or the process's resident set on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
