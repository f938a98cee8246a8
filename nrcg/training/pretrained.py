"""A pretrained diffusion model in the place of a trained one: opened, checked against the configuration, measured."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel

from nrcg.config import ScheduleConfig
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.storage import check_pipeline_files, forget_folder
from nrcg.errors import ConfigError, DataError, NrcgError
from nrcg.files import check_hub_id
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training.ddpm import ddpm_validation_loss
from nrcg.training.feed import TrainingImages
from nrcg.training.trainer import LogRow

KEY = "ddpm.pretrained"
BETA_TOLERANCE = 1e-3
"""Relative; diffusers keeps betas in float32, and files state them with few digits."""
CPU_LOSS_PIXELS = 2**20
"""Pixels of the images whose loss is measured on a CPU: 256 images of 64 x 64, 16 of 256 x 256."""


def open_pretrained(source: str, key: str = KEY) -> tuple[GuidedDDPMPipeline, dict[str, str | None]]:
    """Open a diffusers folder, or fetch a hub id.

    Both layouts are read: subfolders unet/ and scheduler/, and the old one with everything at the top; weights as
    safetensors or as an old `.bin`. No code from it is run: neither pickles in its weights, nor a pipeline or a
    scheduler of its authors' own, as the paper's released models may name them.

    Args:
        source: Folder, hub id, or ID@REVISION.
        key: Key of the configuration that names it, for messages.

    Returns:
        The pipeline, and what it is: source and revision (the hub's commit; None for a folder).

    Raises:
        DataError: it is not there, cannot be fetched, or is damaged.
        ConfigError: its U-Net is no UNet2DModel, or its scheduler is unknown and states no betas.
    """
    if Path(source).is_dir():
        return _open_folder(Path(source), source, key), {"source": source, "revision": None}
    name, _, revision = source.partition("@")
    check_hub_id(name, f"{key}: {source}")
    try:
        # Fetches what an unconditional DDPM consists of.
        folder = Path(DDPMPipeline.download(name, revision=revision or None))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{key}: {source}: no such folder, and not to be had from the hub ({reason})") from error
    return _open_folder(folder, source, key), {"source": name, "revision": folder.name}


def _open_folder(folder: Path, source: str, key: str) -> GuidedDDPMPipeline:
    """The pipeline of a folder, of which only the U-Net and the scheduler are read, whatever class it names."""
    check_pipeline_files(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        unet_class, scheduler_class = (str(index[part][1]) for part in ("unet", "scheduler"))
        if unet_class != "UNet2DModel":
            raise ConfigError(f"{key}: {source}: holds a {unet_class}; a UNet2DModel is needed")
        unet, found = UNet2DModel.from_pretrained(_part(folder, "unet"), output_loading_info=True)
        if found["missing_keys"]:
            raise DataError(f"{key}: {source}: its weights lack {min(found['missing_keys'])}, which would stay random")
        forget_folder(unet)
        scheduler = _open_scheduler(_part(folder, "scheduler"), scheduler_class, f"{key}: {source}")
        return GuidedDDPMPipeline(unet, scheduler)
    except NrcgError:
        raise
    except Exception as error:  # whatever a damaged file makes diffusers raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise DataError(f"{key}: {source}: incomplete or damaged ({reason})") from error


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _open_scheduler(folder: Path, name: str, where: str) -> SchedulerMixin:
    """The scheduler of a folder; one that diffusers does not know is a DDPM scheduler with the betas that it states."""
    known = getattr(diffusers, name, None)
    if isinstance(known, type) and issubclass(known, SchedulerMixin):
        return known.from_pretrained(folder)
    settings = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    if not {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"} <= settings.keys():
        raise ConfigError(f"{where}: scheduler {name} is unknown, and its settings state no betas")
    accepted = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{key: value for key, value in settings.items() if key in accepted})


def check_pretrained(
    pipe: GuidedDDPMPipeline, schedule: ScheduleConfig, *, image_size: int, channels: int, source: str
) -> None:
    """Check that a model is an unconditional one that the sampler knows, and that it fits data set and schedule.

    Args:
        pipe: Model of `open_pretrained`.
        schedule: Noise schedule of the configuration.
        image_size: Height and width of the data set's images.
        channels: C of the data set's images.
        source: Name of the model in messages.

    Raises:
        ConfigError: one line that names what does not fit and what to write.
    """
    unet = pipe.unet.config
    _check_unet(pipe.unet, channels, f"{KEY}: {source}")
    try:
        pipe.sampler()
        pipe.noise_predictor(torch.float32)
        own = pipe.schedule()
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{KEY}: {source}: {error}") from error
    learned = pipe.scheduler.config.get("variance_type") == "learned_range"
    if unet.out_channels != unet.in_channels * (2 if learned else 1):
        raise ConfigError(f"{KEY}: {source}: {unet.in_channels} channels go in, {unet.out_channels} come out")
    size = unet.sample_size if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
    if size not in (image_size, (image_size, image_size)):
        raise ConfigError(
            f"dataset.image_size: {image_size}, but {source} ({KEY}) makes images of {size}: set one to the other's"
        )
    expected = Schedule.from_config(schedule)
    if own.num_steps != expected.num_steps or not torch.allclose(
        _betas(own), _betas(expected), rtol=BETA_TOLERANCE, atol=0.0
    ):
        raise ConfigError(f"ddpm.schedule: differs from that of {source} ({KEY}); {_schedule_to_write(pipe)}")


def open_init(
    source: str, *, image_size: int, channels: int, predicts: str = "epsilon"
) -> tuple[UNet2DModel, dict[str, str | None]]:
    """The U-Net that a training starts from (`ddpm.init`), for images of the data set's size.

    Args:
        source: See `open_pretrained`.
        image_size: Height and width of the data set's images; the U-Net may have been trained on others.
        channels: C of the data set's images.
        predicts: What the training's U-Net puts out, which this one must do too.

    Returns:
        The U-Net, and what it is as `open_pretrained` says.

    Raises:
        DataError, ConfigError: See `open_pretrained`; or its weights mean something else than the training's.
    """
    key = "ddpm.init"
    pipe, origin = open_pretrained(source, key)
    unet, where = pipe.unet, f"{key}: {source}"
    _check_unet(unet, channels, where)
    if unet.config.out_channels != channels:
        raise ConfigError(f"{where}: predicts a variance too, which nrcg does not train")
    if (kind := pipe.scheduler.config.get("prediction_type", "epsilon")) != predicts:
        raise ConfigError(f"{where}: predicts {kind}, ddpm.objective.predicts needs {predicts}")
    halvings = len(unet.config.block_out_channels) - 1
    if image_size % 2**halvings:
        raise ConfigError(f"{where}: halves images {halvings} times, dataset.image_size: {image_size} cannot be")
    unet.register_to_config(sample_size=image_size)
    return unet.requires_grad_(True), origin


def _check_unet(unet: UNet2DModel, channels: int, where: str) -> None:
    """Raises ConfigError where a U-Net is damaged, conditional or made for other channels."""
    if not all(bool(weight.isfinite().all()) for weight in unet.parameters()):
        raise ConfigError(f"{where}: its weights hold values that are not finite")
    if unet.config.num_class_embeds is not None or unet.config.class_embed_type is not None:
        raise ConfigError(f"{where}: is conditional on a class; an unconditional model is needed")
    if unet.config.in_channels != channels:
        raise ConfigError(f"{where}: has {unet.config.in_channels} channels, the data set {channels}")


def _betas(schedule: Schedule) -> torch.Tensor:
    return 1.0 - schedule.abar[1:] / schedule.abar[:-1]


def _schedule_to_write(pipe: GuidedDDPMPipeline) -> str:
    config = pipe.scheduler.config
    known = ScheduleConfig.model_fields["beta_schedule"].annotation.__args__
    if config.get("trained_betas") is not None or config.beta_schedule not in known:
        return f"its betas ({config.beta_schedule}) cannot be stated there; allowed: {', '.join(known)}"
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return "write " + ", ".join(f"{key}: {config[key]}" for key in keys)


def pretrained_row(
    pipe: GuidedDDPMPipeline, val: TrainingImages, *, num_images: int, batch_size: int, precision: torch.dtype
) -> LogRow:
    """The row of training.csv: epoch 0 with the loss on validation images.

    Args:
        pipe: Model, on the device to work on.
        val: Validation images.
        num_images: How many of them are measured; on a CPU at most CPU_LOSS_PIXELS pixels in all.
        batch_size: Images at once.
        precision: Precision of the U-Net.
    """
    _, height, width = val.image_shape
    if val.device.type == "cpu":
        num_images = min(num_images, max(CPU_LOSS_PIXELS // (height * width), 1))
    loss = ddpm_validation_loss(
        pipe.unet,
        pipe.schedule(),
        val,
        num_images,
        batch_size,
        precision,
        prediction_type=pipe.scheduler.config["prediction_type"],
    )
    return {
        "epoch": 0,
        "step": 0,
        "train_loss": math.nan,
        "val_loss": loss,
        "learning_rate": math.nan,
        "images_per_second": math.nan,
    }
