"""Training of the diffusion model, or taking a pretrained one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrcg import tracking
from nrcg.config import DDPMConfig, TrainDDPMStep
from nrcg.data.arrays import mean_image, open_split, to_uint8
from nrcg.data.pictures import sample_grid, save_png
from nrcg.diffusion.storage import save_pipeline
from nrcg.diffusion.unet import build_scheduler
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import checked_data, data_tags, identity, log_dataset, log_epoch, model_record
from nrcg.training import pretrained
from nrcg.training.ddpm import Hooks, train_unet
from nrcg.training.distributed import Ranks
from nrcg.training.feed import TrainingImages, steps_per_epoch
from nrcg.training.trainer import Checkpoint, LogRow


def train_ddpm(
    settings: TrainDDPMStep,
    *,
    data: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
    ranks: Ranks | None = None,
) -> list[LogRow]:
    """Write the unconditional diffusion model as a diffusers pipeline folder: trained, or pretrained.

    Args:
        settings: The experiment's settings.
        data: Folder of the data set.
        out: Folder to write; a checkpoint stands beside it until it is whole.
        device: Device that computes.
        precision: Autocast of the U-Net.
        ranks: The processes that train together; None: this one alone. Only the main one writes.

    Returns:
        The rows of training.csv.
    """
    manifest = checked_data(data)
    if settings.ddpm.pretrained is not None:
        return _take_pretrained(settings, manifest, data, out, device, precision)
    ranks = ranks or Ranks()
    config = settings.ddpm
    train, val = (TrainingImages(*open_split(data, split), device) for split in ("train", "val"))
    checkpoint = Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), identity(settings, manifest), config.checkpoint_minutes
    )
    mean, scheduler = mean_image(data), build_scheduler(config.schedule)
    with contextlib.ExitStack() as stack:
        hooks = Hooks()
        if ranks.main:
            params = settings.model_dump() | {"num_processes": ranks.count}
            run = stack.enter_context(_tracked(settings, params, manifest, data, training="training"))
            steps = config.epochs * steps_per_epoch(len(train), config.batch_size)
            bar = stack.enter_context(Progress("train_ddpm", steps, "step"))

            def keep_grid(unet: nn.Module, epoch: int) -> None:
                path = out.with_name(f"{out.name}.samples") / f"epoch{epoch:04d}.png"
                draw_grid(unet, scheduler, config, mean, precision, path)
                run.log_artifact(path, "samples")

            hooks = Hooks(bar.set, lambda row: log_epoch(run, row), keep_grid, bar.resume)
        unet, log = train_unet(
            config,
            train,
            val,
            image_size=manifest["image_size"],
            channels=manifest["channels"],
            device=device,
            precision=precision,
            checkpoint=checkpoint,
            hooks=hooks,
            ranks=ranks,
        )
        ranks.leave()
        if ranks.main:
            record = model_record(settings, manifest, device, precision) | {"num_processes": ranks.count}
            save_pipeline(out, unet, scheduler, mean, record, log)
            _finish(run, unet, scheduler, config, mean, precision, out)
            checkpoint.remove()
    return log


def _tracked(settings: TrainDDPMStep, params: dict, manifest: dict, data: Path, *, training: str) -> Any:
    """The tracking run, with the data set as its inputs."""

    @contextlib.contextmanager
    def opened():
        with tracking.run(
            settings.experiment, "train_ddpm", kind="train", params=params, tags=data_tags(manifest)
        ) as run:
            log_dataset(run, manifest, data, "train", training)
            log_dataset(run, manifest, data, "val", "validation")
            yield run

    return opened()


def _take_pretrained(
    settings: TrainDDPMStep, manifest: dict, data: Path, out: Path, device: torch.device, precision: torch.dtype
) -> list[LogRow]:
    """A pretrained model into the folder of the trained one, with the data set's mean image."""
    config = settings.ddpm
    pipe, origin = pretrained.open_pretrained(config.pretrained)
    pretrained.check_pretrained(
        pipe,
        config.schedule,
        image_size=manifest["image_size"],
        channels=manifest["channels"],
        source=config.pretrained,
    )
    pipe.to(device)
    mean = mean_image(data)
    params = {"experiment": settings.experiment, "pretrained": origin, "schedule": config.schedule.model_dump()}
    with _tracked(settings, params, manifest, data, training="mean image") as run:
        row = pretrained.pretrained_row(
            pipe,
            TrainingImages(*open_split(data, "val"), device),
            num_images=config.num_val_images,
            batch_size=min(config.batch_size, _grid_batch(manifest["image_size"])),
            precision=precision,
        )
        run.log_metrics({"val_loss": row["val_loss"]})
        record = model_record(settings, manifest, device, precision) | {"pretrained": origin}
        save_pipeline(out, pipe.unet, pipe.scheduler, mean, record, [row])
        _finish(run, pipe.unet, pipe.scheduler, config, mean, precision, out)
    return [row]


def _finish(
    run: Any, unet: nn.Module, scheduler: Any, config: DDPMConfig, mean: np.ndarray, precision: torch.dtype, out: Path
) -> None:
    """A grid of samples into the folder, and both into the tracking run."""
    draw_grid(unet, scheduler, config, mean, precision, out / "samples.png")
    run.log_artifact(out / "samples.png", "samples")
    run.log_model(out, "ddpm")


def draw_grid(
    unet: nn.Module, scheduler: Any, config: DDPMConfig, mean: np.ndarray, precision: torch.dtype, path: Path
) -> None:
    """A grid of 36 unguided samples by all steps; large ones on a CPU, where that takes hours, are few, by DDIM."""
    size = mean.shape[-1]
    pipe = GuidedDDPMPipeline(unet, scheduler)
    pipe.data_mean = torch.from_numpy(mean)
    columns, steps = 6, None
    if size > 64 and pipe.device.type == "cpu":
        columns, steps = (2 if size <= 128 else 1), min(10, len(scheduler.betas))
        pipe.use_sampler("ddim")
    out = pipe(
        num_samples=columns**2,
        batch_size=_grid_batch(size),
        seed=config.seed,
        num_inference_steps=steps,
        precision=precision,
        on_step=lambda done: None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, sample_grid(to_uint8(out.samples), columns))


def _grid_batch(image_size: int) -> int:
    """Samples at once of a grid: the memory of 36 at 64 x 64."""
    return min(max(36 * 64**2 // image_size**2, 1), 36)
