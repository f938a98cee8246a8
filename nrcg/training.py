"""Training of the diffusion model and of the classifiers.

The diffusion model's training goes on after a kill as if nothing had happened: every random choice is a function of
(seed, epoch) or (seed, step), so a resumed training repeats an undisturbed one. The classifiers', which are
short, start anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.classifiers import Classifier, build_module, predicted_class
from nrcg.config import ClassifierConfig, DDPMConfig, OptimizerConfig
from nrcg.datasets import to_unit
from nrcg.diffusion import DATA_MEAN_FILE, Schedule, autocast, build_scheduler, build_unet, freeze
from nrcg.files import atomic_save_array, atomic_write_text, replace_folder, sha256_file, temporary_name
from nrcg.noise import spawn_seed

LogRow = dict[str, float]
OnStep = Callable[[int], None]
OnEpoch = Callable[[LogRow], None]


class Images:
    """A split's images as training batches.

    On a CUDA device all images stay there as uint8 where they take at most a quarter of its free memory; otherwise a
    batch is read from the memory map and sent as uint8.

    Args:
        images: (N, H, W, C) uint8, an array or memory map.
        labels: (N,) int64.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device):
        self._array, self._labels, self._device = images, torch.from_numpy(np.asarray(labels)), device
        self._resident: Tensor | None = None
        if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
            self._resident = torch.from_numpy(np.array(images)).to(device)

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and labels (B,) at some positions."""
        labels = self._labels[indices].to(self._device, non_blocking=True)
        if self._resident is not None:
            pixels = self._resident[indices.to(self._device)].permute(0, 3, 1, 2)
            return pixels.float().div_(127.5).sub_(1.0), labels
        order = np.sort(indices.numpy())  # the memory map is read forwards, then put in order
        rows = self._array[order][np.searchsorted(order, indices.numpy())]
        return to_unit(rows).to(self._device), labels


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Shuffled positions of an epoch in batches; the last, smaller one is dropped unless it is the only one."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(spawn_seed(seed, epoch)))
    for first in range(0, max(num_images - batch_size + 1, 1), batch_size):
        yield order[first : first + batch_size]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    return max(num_images // batch_size, 1)


@dataclass
class _Trainer:
    """AdamW with warm-up and cosine decay, gradient clipping, and loss scaling under float16."""

    module: nn.Module
    config: OptimizerConfig
    total_steps: int
    device: torch.device
    precision: torch.dtype
    step: int = 0
    log: list[LogRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        from diffusers.optimization import get_cosine_schedule_with_warmup

        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        warmup = min(self.config.warmup_steps, self.total_steps // 2)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

    def update(self, loss: Tensor) -> None:
        """One optimiser step from a float32 loss."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def state_dict(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "log": self.log,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("module", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.log = state["step"], state["log"]


class Checkpoint:
    """A training's state in one file, which only the very same training takes up again.

    Args:
        path: of the file.
        identity: fingerprint of everything that shapes the training: settings and data.
        minutes: a checkpoint at least this often.
    """

    def __init__(self, path: Path, identity: str, minutes: float):
        self.path, self.identity, self.seconds = path, identity, 60 * minutes
        # The same name in every process: what a kill left half written is written over, not left behind.
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._saved = time.monotonic()

    def load(self) -> dict | None:
        """The state, or None where there is none that fits; a damaged or foreign one is left aside."""
        try:
            # weights_only: no code is run from the file.
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            print(f"{self.path}: damaged ({type(error).__name__}), training starts anew")
            return None
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            print(f"{self.path}: from other settings or data, training starts anew")
            return None
        return state

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.seconds

    def save(self, state: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(state | {"identity": self.identity}, self._temporary)
            self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)


# --- The diffusion model ----------------------------------------------------------------------------------------


def ddpm_loss(
    unet: nn.Module, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor, precision: torch.dtype
) -> Tensor:
    """The simplified objective of Ho et al. 2020 (eq. 14): mean squared error of the predicted noise.

    Args:
        x0: (B, C, H, W) in [-1, 1].
        t: (B,) steps, 1..T.
        noise: eps, like x0.
    """
    x_t = schedule.q_sample(x0, t, noise)
    with autocast(x0.device, precision):
        eps = unet(x_t, t - 1).sample
    return F.mse_loss(eps.float(), noise)


def _step_noise(seed: int, step: int, x0: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """t (B,) uniform over 1..T and eps like x0, of one training step."""
    generator = torch.Generator(x0.device).manual_seed(spawn_seed(seed, step, 1))
    t = torch.randint(1, num_steps + 1, (len(x0),), generator=generator, device=x0.device)
    return t, torch.randn(x0.shape, generator=generator, device=x0.device)


@torch.no_grad()
def ddpm_validation_loss(
    unet: nn.Module, schedule: Schedule, images: Images, num_images: int, batch_size: int, precision: torch.dtype
) -> float:
    """The loss on the first validation images, t spread evenly over 1..T, with the same noise at every call."""
    total, count = 0.0, min(num_images, len(images))
    for first in range(0, count, batch_size):
        indices = torch.arange(first, min(first + batch_size, count))
        x0, _ = images.batch(indices)
        t = (indices * 2654435761 % schedule.num_steps + 1).to(x0.device)  # a fixed, well-mixed t per image
        _, noise = _step_noise(0, first, x0, schedule.num_steps)
        total += ddpm_loss(unet, schedule, x0, t, noise, precision).item() * len(indices)
    return total / count


def train_ddpm(
    config: DDPMConfig,
    train: Images,
    val: Images,
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
) -> tuple[nn.Module, list[LogRow]]:
    """Train the U-Net of an unconditional DDPM.

    Args:
        on_step: called after each step with the number of steps done.
        on_epoch: called with each epoch's row: epoch, step, train_loss, val_loss, learning_rate, images_per_second.
        on_samples: called with the EMA's U-Net and the epoch when a sample grid is due.
        on_resume: called with the number of steps that a checkpoint brings.

    Returns:
        The U-Net with the EMA's weights, frozen, and all rows.
    """
    from diffusers.training_utils import EMAModel

    torch.manual_seed(spawn_seed(config.seed, 0, 2))
    schedule = Schedule.from_config(config.schedule)
    unet = build_unet(config.unet, image_size, channels).to(device)
    ema_unet = freeze(build_unet(config.unet, image_size, channels).to(device))
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    trainer = _Trainer(unet, config.optimizer, per_epoch * config.epochs, device, precision)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    epoch_loss, epoch_began, epoch_steps = torch.zeros((), device=device), time.perf_counter(), 0
    state = checkpoint.load()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        ema.load_state_dict(state["ema"])
        ema.to(device)
        epoch_loss = state["epoch_loss"].to(device)
        on_resume(trainer.step)
    unet.train()
    # By the rows, not the steps: a checkpoint of an epoch's last step comes before its row.
    for epoch in range(len(trainer.log), config.epochs):
        batches = list(epoch_batches(len(train), config.batch_size, config.seed, epoch))
        for indices in batches[trainer.step - epoch * per_epoch :]:
            x0, _ = train.batch(indices)
            t, noise = _step_noise(config.seed, trainer.step, x0, schedule.num_steps)
            if config.unet.dropout:
                torch.manual_seed(spawn_seed(config.seed, trainer.step, 4))
            loss = ddpm_loss(unet, schedule, x0, t, noise, precision)
            trainer.update(loss)
            ema.step(unet.parameters())
            epoch_loss += loss.detach()
            epoch_steps += 1
            on_step(trainer.step)
            if checkpoint.due():
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
                ema_unet, schedule, val, config.num_val_images, config.batch_size, precision
            ),
            "learning_rate": trainer.learning_rate,
            "images_per_second": epoch_steps * config.batch_size / seconds,
        }
        trainer.log.append(row)
        on_epoch(row)
        if config.sample_every and (epoch + 1) % config.sample_every == 0 and epoch + 1 < config.epochs:
            on_samples(ema_unet, epoch + 1)
        epoch_loss, epoch_began, epoch_steps = torch.zeros((), device=device), time.perf_counter(), 0
    ema.copy_to(ema_unet.parameters())
    return ema_unet, trainer.log


def save_pipeline(
    folder: Path, unet: nn.Module, config: DDPMConfig, data_mean: np.ndarray, record: dict, log: list[LogRow]
) -> None:
    """Write a diffusers pipeline folder as a whole, with the mean training image, training.csv and training.json.

    Args:
        data_mean: (C, H, W) in [-1, 1].
        record: settings, data and versions; the weights' SHA-256 is added.
    """
    from diffusers import DDPMPipeline

    from nrcg.results import write_csv

    new = temporary_name(folder)
    DDPMPipeline(unet, build_scheduler(config.schedule)).save_pretrained(new)
    atomic_save_array(new / DATA_MEAN_FILE, data_mean.astype(np.float32))
    write_csv(new / "training.csv", log, list(log[0]))
    weights = new / "unet" / "diffusion_pytorch_model.safetensors"
    atomic_write_text(new / "training.json", json.dumps(record | {"sha256": sha256_file(weights)}, indent=2) + "\n")
    replace_folder(new, folder)


# --- Classifiers ------------------------------------------------------------------------------------------------


def train_classifier(
    config: ClassifierConfig,
    schedule: Schedule,
    train: Images,
    val: Images,
    *,
    num_classes: int,
    device: torch.device,
    precision: torch.dtype,
    on_step: OnStep,
    on_epoch: OnEpoch,
) -> tuple[Classifier, list[LogRow]]:
    """Train a classifier by cross-entropy; a robust one on images noised by eq. 2, each at its own t in 1..T.

    Returns:
        The classifier, frozen, and a row per epoch: epoch, step, train_loss, val_accuracy, learning_rate.
    """
    torch.manual_seed(spawn_seed(config.seed, 0, 3))
    module = build_module(config.architecture, num_classes, config.batch_norm_momentum)
    module = module.to(device, memory_format=torch.channels_last)
    classifier = Classifier(module).to(device)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    trainer = _Trainer(module, config.optimizer, per_epoch * config.epochs, device, precision)
    for epoch in range(config.epochs):
        classifier.train()
        total = torch.zeros((), device=device)
        for indices in epoch_batches(len(train), config.batch_size, config.seed, epoch):
            x, labels = train.batch(indices)
            if config.noised:
                t, noise = _step_noise(config.seed, trainer.step, x, schedule.num_steps)
                x = schedule.q_sample(x, t, noise)
            with autocast(device, precision):
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels)
            trainer.update(loss)
            total += loss.detach()
            on_step(trainer.step)
        row = {
            "epoch": epoch + 1,
            "step": trainer.step,
            "train_loss": total.item() / per_epoch,
            "val_accuracy": accuracy(classifier.eval(), val),
            "learning_rate": trainer.learning_rate,
        }
        trainer.log.append(row)
        on_epoch(row)
    return freeze(classifier), trainer.log


@torch.no_grad()
def accuracy(
    classifier: Classifier,
    images: Images,
    *,
    schedule: Schedule | None = None,
    t: int = 0,
    num_images: int | None = None,
    batch_size: int = 256,
) -> float:
    """Share of images classified rightly, in float32; noised by eq. 2 to step t when a schedule is given.

    Args:
        num_images: the first ones only; None takes all.
    """
    count = len(images) if num_images is None else min(num_images, len(images))
    right = 0
    for first in range(0, count, batch_size):
        x, labels = images.batch(torch.arange(first, min(first + batch_size, count)))
        if schedule is not None and t > 0:
            _, noise = _step_noise(t, first, x, schedule.num_steps)
            x = schedule.q_sample(x, t, noise)
        right += int((predicted_class(classifier(x)) == labels).sum())
    return right / count


def accuracy_over_t(
    classifier: Classifier, schedule: Schedule, images: Images, *, num_points: int = 21, num_images: int = 512
) -> list[LogRow]:
    """Accuracy on noised images at evenly spaced t from 0 to T: rows t, accuracy."""
    points = sorted({round(share) for share in np.linspace(0, schedule.num_steps, num_points)})
    return [
        {"t": t, "accuracy": accuracy(classifier, images, schedule=schedule, t=t, num_images=num_images)}
        for t in points
    ]
