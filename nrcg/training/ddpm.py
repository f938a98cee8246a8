"""Training of the diffusion model and of the classifiers.

A training goes on after a kill as if nothing had happened: every random choice is a function of (seed, epoch) or
(seed, step), or its generator's state is in the checkpoint, so a resumed training repeats an undisturbed one. Neither
the number of processes nor the size of the micro-batches changes the diffusion model's, beyond rounding.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.config import DDPMConfig
from nrcg.devices import autocast, freeze
from nrcg.diffusion.noise import spawn_seed
from nrcg.diffusion.objectives import to_eps
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_unet
from nrcg.errors import ConfigError
from nrcg.training.distributed import Ranks
from nrcg.training.feed import TrainingImages, batches_from, steps_per_epoch
from nrcg.training.trainer import Checkpoint, LogRow, OnEpoch, OnStep, Trainer, chunks, naming_memory, step_noise


def ddpm_loss(
    unet: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    precision: torch.dtype,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The simplified objective of Ho et al. 2020 (eq. 14): mean squared error of the predicted noise.

    Args:
        x0: (B, C, H, W) in [-1, 1].
        t: (B,) steps, 1..T.
        noise: eps, like x0.
        prediction_type: what the U-Net predicts (`nrcg.diffusion.objectives.to_eps`).
    """
    x_t = schedule.q_sample(x0, t, noise)
    with autocast(x0.device, precision):
        output = unet(x_t, t - 1).sample
    eps = to_eps(output.float()[:, : x0.shape[1]], x_t, t, schedule, prediction_type)
    return F.mse_loss(eps, noise)


@torch.no_grad()
def ddpm_validation_loss(
    unet: nn.Module,
    schedule: Schedule,
    images: TrainingImages,
    num_images: int,
    batch_size: int,
    precision: torch.dtype,
    *,
    micro_batch_size: int | None = None,
    prediction_type: str = "epsilon",
    ranks: Ranks | None = None,
) -> float:
    """The loss on the first images, t spread evenly over 1..T, with the same noise at every call."""
    ranks = ranks or Ranks()
    count = min(num_images, len(images))
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, count, batch_size):
        indices = torch.arange(first, min(first + batch_size, count))
        # The noise is the batch's, whoever computes which part of it.
        device, noise = images.device, None
        mine = ranks.share(len(indices))
        for part in chunks(mine.start, mine.stop, micro_batch_size):
            if noise is None:
                _, noise = step_noise(0, first, (len(indices), *images.image_shape), schedule.num_steps, device)
            x0, _ = images.batch(indices[part])
            t = (indices[part] * 2654435761 % schedule.num_steps + 1).to(device)  # a fixed, well-mixed t per image
            loss = ddpm_loss(unet, schedule, x0, t, noise[part], precision, prediction_type)
            total += loss.item() * len(x0)
    # As float32, which every device can send.
    return ranks.sum(total.to(device, torch.float32)).item() / count if ranks.count > 1 else total.item() / count


def train_unet(
    config: DDPMConfig,
    train: TrainingImages,
    val: TrainingImages,
    *,
    image_size: int,
    channels: int,
    device: torch.device,
    precision: torch.dtype,
    checkpoint: Checkpoint,
    on_step: OnStep,
    on_epoch: OnEpoch,
    on_samples: Callable[[nn.Module, int], None],
    on_resume: OnStep = lambda step: None,
    ranks: Ranks | None = None,
) -> tuple[nn.Module, list[LogRow]]:
    """Train the U-Net of an unconditional DDPM.

    Args:
        on_step: called after each step with the number of steps done.
        on_epoch: called with each epoch's row: epoch, step, train_loss, val_loss, learning_rate, images_per_second.
        on_samples: called with the EMA's U-Net and the epoch when a sample grid is due.
        on_resume: called with the number of steps that a checkpoint brings.
        ranks: the processes that train together, each with this call; None: this one alone. Only the main one writes
            checkpoints; every one calls the hooks.

    Returns:
        The U-Net with the EMA's weights, frozen, and all rows.

    Raises:
        ConfigError, DataError: fewer images in a batch than processes; out of memory; checkpoints that differ.
    """
    from diffusers.training_utils import EMAModel

    ranks = ranks or Ranks()
    batch_size = min(config.batch_size, len(train))
    if ranks.count > batch_size:
        raise ConfigError(f"ddpm.num_processes: {ranks.count} processes cannot share a batch of {batch_size} images")
    torch.manual_seed(spawn_seed(config.seed, 0, 2))
    schedule = Schedule.from_config(config.schedule)
    unet = build_unet(config.unet, image_size, channels).to(device)
    ema_unet = freeze(build_unet(config.unet, image_size, channels).to(device))
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    trainer = Trainer(unet, config.optimizer, per_epoch * config.epochs, device, precision)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    epoch_loss, epoch_began, epoch_steps = torch.zeros((), device=device), time.perf_counter(), 0
    state = checkpoint.load()
    ranks.check_equal(-1 if state is None else state["trainer"]["step"], f"{checkpoint.path}: the step")
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        ema.load_state_dict(state["ema"])
        ema.to(device)
        epoch_loss = state["epoch_loss"].to(device)
        on_resume(trainer.step)
        del state
    unet.train()
    replicas = ranks.wrap(unet)
    mine = ranks.share(batch_size)
    parts = chunks(mine.start, mine.stop, config.micro_batch_size)
    order = batches_from(len(train), config.batch_size, config.seed, trainer.step, config.epochs)
    feed = train.batches(indices[mine] for indices in order)

    def accumulate(x0: Tensor) -> Tensor:
        """Add up the gradients of this process's images; returns their part of the step's loss."""
        shape = (batch_size, *x0.shape[1:])
        t, noise = step_noise(config.seed, trainer.step, shape, schedule.num_steps, device)
        total = torch.zeros((), device=device)
        for part in parts:
            if config.unet.dropout:
                torch.manual_seed(spawn_seed(config.seed, trainer.step, 4, part.start))
            # The processes meet at the last part alone.
            with contextlib.nullcontext() if part is parts[-1] else ranks.no_sync(replicas):
                images = x0[part.start - mine.start : part.stop - mine.start]
                loss = ddpm_loss(replicas, schedule, images, t[part], noise[part], precision)
                share = loss * (len(images) / batch_size)
                trainer.backward(share * ranks.count)  # the processes' gradients are averaged, not summed
            total += share.detach()
        return total

    advice = f"{max(part.stop - part.start for part in parts)} images at once on {device} are too many: take fewer, "
    with naming_memory("ddpm.micro_batch_size", advice + "it changes no result"):
        # By the rows, not the steps: a checkpoint of an epoch's last step comes before its row.
        for epoch in range(len(trainer.log), config.epochs):
            while trainer.step < (epoch + 1) * per_epoch:
                x0, _ = next(feed)
                loss = accumulate(x0)
                trainer.update()
                ema.step(unet.parameters())
                epoch_loss += ranks.sum(loss)
                epoch_steps += 1
                on_step(trainer.step)
                if ranks.main and checkpoint.due():
                    checkpoint.save(
                        {"trainer": trainer.state_dict(), "ema": ema.state_dict(), "epoch_loss": epoch_loss.cpu()}
                    )
            ema.copy_to(ema_unet.parameters())
            seconds = time.perf_counter() - epoch_began
            row = {
                "epoch": epoch + 1,
                "step": trainer.step,
                "train_loss": epoch_loss.item() / per_epoch,
                "val_loss": ddpm_validation_loss(
                    ema_unet,
                    schedule,
                    val,
                    config.num_val_images,
                    config.batch_size,
                    precision,
                    micro_batch_size=config.micro_batch_size,
                    ranks=ranks,
                ),
                "learning_rate": trainer.learning_rate,
                "images_per_second": epoch_steps * batch_size / seconds,
            }
            trainer.log.append(row)
            on_epoch(row)
            if config.sample_every and (epoch + 1) % config.sample_every == 0 and epoch + 1 < config.epochs:
                on_samples(ema_unet, epoch + 1)
            epoch_loss, epoch_began, epoch_steps = torch.zeros((), device=device), time.perf_counter(), 0
    ema.copy_to(ema_unet.parameters())
    return ema_unet, trainer.log
