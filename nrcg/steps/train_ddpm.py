"""Training of the diffusion model, or taking a pretrained one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nrcg import tracking
from nrcg.config import DDPMConfig, TrainDDPMStep
from nrcg.data.arrays import mean_image, open_split
from nrcg.diffusion.objectives import NATIVE
from nrcg.diffusion.storage import save_pipeline
from nrcg.diffusion.unet import build_scheduler
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import checked_data, data_tags, identity, log_dataset, log_epoch, model_record
from nrcg.steps.grids import Grids, grid_batch
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
    preview: Sequence[Path] = (),
    objective: str | None = None,
) -> list[LogRow]:
    """Write the unconditional diffusion model as a diffusers pipeline folder: trained, or pretrained.

    Args:
        settings: The experiment's settings.
        data: Folder of the data set.
        out: Folder to write; a checkpoint stands beside it until it is whole.
        device: Device that computes.
        precision: Autocast of the U-Net.
        ranks: The processes that train together; None: this one alone. Only the main one writes.
        preview: Folders of classifiers. The first that is there guides more samples, each `ddpm.sample_every` epochs.
        objective: Name of its objective in a grid, whose models MLflow is not given; None: the experiment's own.

    Returns:
        The rows of training.csv.
    """
    manifest = checked_data(data)
    if settings.ddpm.pretrained is not None:
        return _take_pretrained(settings, manifest, data, out, device, precision)
    ranks, config = ranks or Ranks(), settings.ddpm
    train, val = (TrainingImages(*open_split(data, split), device) for split in ("train", "val"))
    checkpoint = Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), identity(settings, manifest), config.checkpoint_minutes
    )
    mean, scheduler = mean_image(data), build_scheduler(config.schedule, NATIVE[config.objective.predicts])
    grids = Grids(scheduler, config, mean, precision)
    size, channels = manifest["image_size"], manifest["channels"]
    start, origin = _start(config, size, channels)
    with contextlib.ExitStack() as stack:
        hooks = Hooks()
        if ranks.main:
            params = settings.model_dump() | {"num_processes": ranks.count}
            tracked = _tracked(settings, params, manifest, data, training="training", objective=objective)
            run = stack.enter_context(tracked)
            steps = config.epochs * steps_per_epoch(len(train), config.batch_size)
            bar = stack.enter_context(Progress("train_ddpm", steps, "step"))
            keep_grids = functools.partial(_keep_grids, run, grids, out.with_name(f"{out.name}.samples"), preview)
            hooks = Hooks(bar.set, lambda row: log_epoch(run, row), keep_grids, bar.resume)
        unet, log = train_unet(
            config,
            train,
            val,
            image_size=size,
            channels=channels,
            device=device,
            precision=precision,
            checkpoint=checkpoint,
            hooks=hooks,
            ranks=ranks,
            unet=start,
            compile=settings.compile,
        )
        ranks.leave()
        if ranks.main:
            record = model_record(settings, manifest, device, precision) | {"num_processes": ranks.count}
            record |= {"init": origin} if origin is not None else {}
            save_pipeline(out, unet, scheduler, mean, record, log)
            _finish(run, unet, grids, out, model=objective is None)
            checkpoint.remove()
    return log


def _start(config: DDPMConfig, size: int, channels: int) -> tuple[nn.Module | None, dict | None]:
    """The U-Net that the training starts from, and what it is; None: random weights."""
    if config.init is None:
        return None, None
    predicts = NATIVE[config.objective.predicts]
    return pretrained.open_init(config.init, image_size=size, channels=channels, predicts=predicts)


def _tracked(
    settings: TrainDDPMStep, params: dict, manifest: dict, data: Path, *, training: str, objective: str | None = None
) -> Any:
    """The tracking run, with the data set as its inputs."""

    name = " ".join(filter(None, ("train_ddpm", objective)))

    @contextlib.contextmanager
    def opened():
        with tracking.run(settings.experiment, name, kind="train", params=params, tags=data_tags(manifest)) as run:
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
            batch_size=min(config.batch_size, grid_batch(manifest["image_size"])),
            precision=precision,
        )
        run.log_metrics({"val_loss": row["val_loss"]})
        record = model_record(settings, manifest, device, precision) | {"pretrained": origin}
        save_pipeline(out, pipe.unet, pipe.scheduler, mean, record, [row])
        _finish(run, pipe.unet, Grids(pipe.scheduler, config, mean, precision), out)
    return [row]


def _keep_grids(run: Any, grids: Grids, folder: Path, preview: Sequence[Path], unet: nn.Module, epoch: int) -> None:
    """The grids of an epoch, into the folder and into the tracking run."""
    for path in grids.draw_early(unet, folder / f"epoch{epoch:04d}.png", preview):
        run.log_artifact(path, "samples")


def _finish(run: Any, unet: nn.Module, grids: Grids, out: Path, model: bool = True) -> None:
    """A grid of samples into the folder, and both into the tracking run."""
    grids.draw(unet, out / "samples.png")
    run.log_artifact(out / "samples.png", "samples")
    if model:
        run.log_model(out, "ddpm")
