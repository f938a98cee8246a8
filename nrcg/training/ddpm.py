"""Training of the diffusion model and of the classifiers.

A training goes on after a kill as if nothing had happened: every random choice is a function of (seed, epoch) or
(seed, step), or its generator's state is in the checkpoint, so a resumed training repeats an undisturbed one. Neither
the number of processes nor the size of the micro-batches changes the diffusion model's, beyond rounding.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.config import Compile, DDPMConfig
from nrcg.devices import autocast, freeze
from nrcg.diffusion.compiling import compile_in_place, forward_flop, resolve_compile
from nrcg.diffusion.noise import spawn_seed
from nrcg.diffusion.objectives import Objective, to_eps
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_unet
from nrcg.errors import ConfigError, DataError
from nrcg.training.distributed import Ranks
from nrcg.training.feed import TrainingImages, batches_from, steps_per_epoch
from nrcg.training.timesteps import ImportanceTimesteps
from nrcg.training.trainer import Checkpoint, LogRow, OnEpoch, OnStep, Trainer, chunks, naming_memory, step_noise


def unet_output(unet: nn.Module, x_t: Tensor, t: Tensor, precision: torch.dtype) -> Tensor:
    """What the U-Net puts out for x_t at the steps t (B,), 1..T, in float32; of a learned variance nothing."""
    with autocast(x_t.device, precision):
        output = unet(x_t, t - 1).sample
    return output.float()[:, : x_t.shape[1]]


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
    eps = to_eps(unet_output(unet, x_t, t, precision), x_t, t, schedule, prediction_type)
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


@dataclass
class Hooks:
    """What a training calls.

    Attributes:
        on_step: After each step, with the number of steps done.
        on_epoch: With each epoch's row: epoch, step, train_loss, val_loss, learning_rate, images_per_second.
        on_samples: With the EMA's U-Net and the epoch, when a sample grid is due.
        on_resume: With the number of steps that a checkpoint brings.
    """

    on_step: OnStep = lambda step: None
    on_epoch: OnEpoch = lambda row: None
    on_samples: Callable[[nn.Module, int], None] = lambda unet, epoch: None
    on_resume: OnStep = lambda step: None


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
    hooks: Hooks | None = None,
    ranks: Ranks | None = None,
    unet: nn.Module | None = None,
    compile: Compile = "off",
) -> tuple[nn.Module, list[LogRow]]:
    """Train the U-Net of an unconditional DDPM.

    Args:
        config: Settings of the network and its training.
        train, val: Images of each split.
        image_size: Height and width.
        channels: Of the images.
        device: Device that computes.
        precision: Autocast of the U-Net.
        checkpoint: Where the training's state is kept.
        hooks: What is called under way; every process calls its own.
        ranks: The processes that train together, each with this call; None: this one alone. Only the main one writes
            checkpoints.
        unet: What it starts from, changed in place; None: `config.unet` with random weights.
        compile: The U-Net by torch.compile; auto: on a GPU, where the training is long enough.

    Returns:
        The U-Net with the EMA's weights, frozen, and all rows.

    Raises:
        ConfigError, DataError: Fewer images in a batch than processes; out of memory; checkpoints that differ.
    """
    run = _Training(config, train, val, image_size, channels, device, precision, checkpoint, ranks or Ranks(), unet)
    hooks = hooks or Hooks()
    run.compile(compile, (channels, image_size, image_size))
    run.resume(hooks)
    advice = f"{max(part.stop - part.start for part in run.parts)} images at once on {device} are too many: take fewer,"
    with naming_memory("ddpm.micro_batch_size", f"{advice} it changes no result"):
        # By the rows, not the steps: a checkpoint of an epoch's last step comes before its row.
        for epoch in range(len(run.trainer.log), config.epochs):
            run.train_epoch(epoch, hooks)
            if config.sample_every and (epoch + 1) % config.sample_every == 0 and epoch + 1 < config.epochs:
                hooks.on_samples(run.ema_unet, epoch + 1)
            run.start_epoch()
    run.ema.copy_to(run.ema_unet.parameters())
    return run.ema_unet, run.trainer.log


class _Training:
    """The state of a training of the U-Net."""

    def __init__(
        self,
        config: DDPMConfig,
        train: TrainingImages,
        val: TrainingImages,
        image_size: int,
        channels: int,
        device: torch.device,
        precision: torch.dtype,
        checkpoint: Checkpoint,
        ranks: Ranks,
        unet: nn.Module | None,
    ) -> None:
        self.config, self.train, self.val, self.device, self.precision = config, train, val, device, precision
        self.checkpoint, self.ranks = checkpoint, ranks
        self.batch_size = min(config.batch_size, len(train))
        if ranks.count > self.batch_size:
            raise ConfigError(
                f"ddpm.num_processes: {ranks.count} processes cannot share a batch of {self.batch_size} images"
            )
        torch.manual_seed(spawn_seed(config.seed, 0, 2))
        self.schedule = Schedule.from_config(config.schedule)
        self.unet = (build_unet(config.unet, image_size, channels) if unet is None else unet).to(device)
        self.ema_unet = freeze(copy.deepcopy(self.unet))
        self.dropout = any(layer.p > 0 for layer in self.unet.modules() if isinstance(layer, nn.Dropout))
        self.per_epoch = steps_per_epoch(len(train), config.batch_size)
        self.trainer = Trainer(self.unet, config.optimizer, self.per_epoch * config.epochs, device, precision)
        self.objective = Objective(config.objective, self.schedule)
        self.importance = None
        if config.objective.timesteps == "importance":
            self.importance = ImportanceTimesteps(self.schedule.num_steps, config.seed, device)
        self.ema = EMAModel(self.unet.parameters(), decay=config.ema_decay, foreach=True)
        self.mine = ranks.share(self.batch_size)
        self.parts = chunks(self.mine.start, self.mine.stop, config.micro_batch_size)
        self.start_epoch()

    def compile(self, choice: Compile, shape: tuple[int, int, int]) -> None:
        """The U-Net that is trained; its average, which draws grids and validates, stays as it is."""
        # Backward takes as long as two forward passes.
        passes = 3 * self.trainer.total_steps * self.batch_size // self.ranks.count
        compiled = resolve_compile(choice, self.device, lambda: passes * forward_flop(self.ema_unet, shape))
        if compiled != "off":
            compile_in_place(self.unet)

    def start_epoch(self) -> None:
        """The sums over an epoch begin anew."""
        self.epoch_loss = torch.zeros((), device=self.device)
        self.epoch_began, self.epoch_steps = time.perf_counter(), 0

    def resume(self, hooks: Hooks) -> None:
        """Take up the checkpoint where there is one, and line up the batches."""
        state, config = self.checkpoint.load(), self.config
        step = -1 if state is None else state["trainer"]["step"]
        self.ranks.check_equal(step, f"{self.checkpoint.path}: the step")
        if state is not None:
            self.trainer.load_state_dict(state["trainer"])
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
            self.epoch_loss = state["epoch_loss"].to(self.device)
            if self.importance is not None:
                self.importance.load_state_dict(state["timesteps"])
            hooks.on_resume(self.trainer.step)
        self.unet.train()
        self.replicas = self.ranks.wrap(self.unet)
        order = batches_from(len(self.train), config.batch_size, config.seed, self.trainer.step, config.epochs)
        self.feed = self.train.batches(indices[self.mine] for indices in order)

    def train_epoch(self, epoch: int, hooks: Hooks) -> None:
        """The steps of an epoch that are left, and its row."""
        while self.trainer.step < (epoch + 1) * self.per_epoch:
            x0, _ = next(self.feed)
            loss = self.accumulate(x0)
            self.trainer.update()
            self.ema.step(self.unet.parameters())
            self.epoch_loss += self.ranks.sum(loss)
            self.epoch_steps += 1
            hooks.on_step(self.trainer.step)
            if self.ranks.main and self.checkpoint.due():
                state = {"trainer": self.trainer.state_dict(), "ema": self.ema.state_dict()}
                state |= {} if self.importance is None else {"timesteps": self.importance.state_dict()}
                self.checkpoint.save(state | {"epoch_loss": self.epoch_loss.cpu()})
        if not torch.isfinite(self.epoch_loss):
            raise DataError(
                f"the loss of epoch {epoch + 1} is not finite; lower ddpm.optimizer.learning_rate or grad_clip, or take"
                " another ddpm.objective"
            )
        self.ema.copy_to(self.ema_unet.parameters())
        seconds = time.perf_counter() - self.epoch_began
        row = {
            "epoch": epoch + 1,
            "step": self.trainer.step,
            "train_loss": self.epoch_loss.item() / self.per_epoch,
            "val_loss": ddpm_validation_loss(
                self.ema_unet,
                self.schedule,
                self.val,
                self.config.num_val_images,
                self.config.batch_size,
                self.precision,
                prediction_type=self.objective.native,
                micro_batch_size=self.config.micro_batch_size,
                ranks=self.ranks,
            ),
            "learning_rate": self.trainer.learning_rate,
            "images_per_second": self.epoch_steps * self.batch_size / seconds,
        }
        self.trainer.log.append(row)
        hooks.on_epoch(row)

    def accumulate(self, x0: Tensor) -> Tensor:
        """Add up the gradients of this process's images; returns their part of the step's loss."""
        config, shape = self.config, (self.batch_size, *x0.shape[1:])
        t, noise = step_noise(config.seed, self.trainer.step, shape, self.schedule.num_steps, self.device)
        factors = None
        if self.importance is not None:
            t, factors = self.importance.draw(self.trainer.step, len(t))
        total, seen = torch.zeros((), device=self.device), []
        for part in self.parts:
            if self.dropout:
                torch.manual_seed(spawn_seed(config.seed, self.trainer.step, 4, part.start))
            # The processes meet at the last part alone.
            with contextlib.nullcontext() if part is self.parts[-1] else self.ranks.no_sync(self.replicas):
                images = x0[part.start - self.mine.start : part.stop - self.mine.start]
                loss, losses = self.loss(images, t[part], noise[part], None if factors is None else factors[part])
                share = loss * (len(images) / self.batch_size)
                self.trainer.backward(share * self.ranks.count)  # the gradients are averaged, not summed
            seen.append(losses)
            total += share.detach()
        if self.importance is not None:
            self.importance.update(self.ranks.sum(self.importance.sums(t[self.mine], torch.cat(seen))))
        return total

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The loss of some images, and where t is drawn by importance those of each (B,), before their factors."""
        output = unet_output(self.replicas, self.schedule.q_sample(x0, t, noise), t, self.precision)
        if factors is None:
            return self.objective.loss(output, x0, noise, t), None
        losses = self.objective.losses(output, x0, noise, t)
        return (losses * factors).mean(), losses.detach()
