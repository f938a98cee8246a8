"""Training of the diffusion model and of the classifiers.

A training goes on after a kill as if nothing had happened: every random choice is a function of (seed, epoch) or
(seed, step), or its generator's state is in the checkpoint, so a resumed training repeats an undisturbed one. Neither
the number of processes nor the size of the micro-batches changes the diffusion model's, beyond rounding.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.classifiers import Classifier, build_module, predicted_class
from nrcg.config import ClassifierConfig, DDPMConfig, OptimizerConfig
from nrcg.diffusion import (
    DATA_MEAN_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    Schedule,
    autocast,
    build_unet,
    freeze,
    to_eps,
)
from nrcg.distributed import Ranks
from nrcg.errors import ConfigError, DataError
from nrcg.files import atomic_save_array, naming, replace_folder, sha256_file, temporary_name, write_record
from nrcg.loading import Images, batches_from, steps_per_epoch
from nrcg.noise import spawn_seed

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DModel

LogRow = dict[str, float]
OnStep = Callable[[int], None]
OnEpoch = Callable[[LogRow], None]


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

    def backward(self, loss: Tensor) -> None:
        """Add a float32 loss's gradient."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """One optimiser step from the gradients added since the last."""
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
        try:
            with naming(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
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
        prediction_type: what the U-Net predicts (`nrcg.diffusion.to_eps`).
    """
    x_t = schedule.q_sample(x0, t, noise)
    with autocast(x0.device, precision):
        output = unet(x_t, t - 1).sample
    eps = to_eps(output.float()[:, : x0.shape[1]], x_t, t, schedule, prediction_type)
    return F.mse_loss(eps, noise)


def _step_noise(
    seed: int, step: int, shape: Sequence[int], num_steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """t (B,) uniform over 1..T and eps (B, C, H, W), of one training step."""
    generator = torch.Generator(device).manual_seed(spawn_seed(seed, step, 1))
    t = torch.randint(1, num_steps + 1, (shape[0],), generator=generator, device=device)
    return t, torch.randn(tuple(shape), generator=generator, device=device)


def _chunks(start: int, stop: int, size: int | None) -> list[slice]:
    """Positions start..stop in pieces of at most `size`; None: in one."""
    size = size or max(stop - start, 1)
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@contextlib.contextmanager
def _naming_memory(key: str, advice: str) -> Iterator[None]:
    """Out of memory becomes one line that names the key to change."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise DataError(f"{key}: out of memory; {advice}") from error


@torch.no_grad()
def ddpm_validation_loss(
    unet: nn.Module,
    schedule: Schedule,
    images: Images,
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
        for part in _chunks(mine.start, mine.stop, micro_batch_size):
            if noise is None:
                _, noise = _step_noise(0, first, (len(indices), *images.image_shape), schedule.num_steps, device)
            x0, _ = images.batch(indices[part])
            t = (indices[part] * 2654435761 % schedule.num_steps + 1).to(device)  # a fixed, well-mixed t per image
            loss = ddpm_loss(unet, schedule, x0, t, noise[part], precision, prediction_type)
            total += loss.item() * len(x0)
    # As float32, which every device can send.
    return ranks.sum(total.to(device, torch.float32)).item() / count if ranks.count > 1 else total.item() / count


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
    trainer = _Trainer(unet, config.optimizer, per_epoch * config.epochs, device, precision)
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
    parts = _chunks(mine.start, mine.stop, config.micro_batch_size)
    order = batches_from(len(train), config.batch_size, config.seed, trainer.step, config.epochs)
    feed = train.batches(indices[mine] for indices in order)

    def accumulate(x0: Tensor) -> Tensor:
        """Add up the gradients of this process's images; returns their part of the step's loss."""
        shape = (batch_size, *x0.shape[1:])
        t, noise = _step_noise(config.seed, trainer.step, shape, schedule.num_steps, device)
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
    with _naming_memory("ddpm.micro_batch_size", advice + "it changes no result"):
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


def save_pipeline(
    folder: Path,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    data_mean: np.ndarray,
    record: dict,
    log: list[LogRow],
) -> None:
    """Write a diffusers pipeline folder as a whole, with the mean training image, training.csv and training.json.

    Args:
        data_mean: (C, H, W) in [-1, 1].
        record: settings, data and versions; the weights' SHA-256 is added, and under `files` that of every file.
    """
    from diffusers import DDPMPipeline

    from nrcg.results import write_csv

    new = temporary_name(folder)
    try:
        with naming(folder):
            DDPMPipeline(unet, scheduler).save_pretrained(new)
            atomic_save_array(new / DATA_MEAN_FILE, data_mean.astype(np.float32))
            sums = {path.relative_to(new).as_posix(): sha256_file(path) for path in new.rglob("*") if path.is_file()}
            write_csv(new / "training.csv", log, list(log[0]))
            write_record(new / RECORD_FILE, record | {"sha256": sums[WEIGHTS_FILE], "files": sums})
            replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
    checkpoint: Checkpoint,
    on_step: OnStep,
    on_epoch: OnEpoch,
    on_resume: OnStep = lambda step: None,
) -> tuple[Classifier, list[LogRow]]:
    """Train a classifier by cross-entropy; a robust one on images noised by eq. 2, each at its own t in 1..T.

    Args:
        on_resume: called with the number of steps that a checkpoint brings.

    Returns:
        The classifier, frozen, and a row per epoch: epoch, step, train_loss, val_accuracy, learning_rate.
    """
    torch.manual_seed(spawn_seed(config.seed, 0, 3))
    module = build_module(config.architecture, num_classes, config.batch_norm_momentum)
    module = module.to(device, memory_format=torch.channels_last)
    classifier = Classifier(module).to(device)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    trainer = _Trainer(module, config.optimizer, per_epoch * config.epochs, device, precision)
    total = torch.zeros((), device=device)
    state = checkpoint.load()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        total = state["epoch_loss"].to(device)
        _set_random_state(state["random"], device)
        on_resume(trainer.step)
    feed = train.batches(batches_from(len(train), config.batch_size, config.seed, trainer.step, config.epochs))
    with _naming_memory("batch_size", f"{config.batch_size} images at once on {device} are too many: take fewer"):
        for epoch in range(len(trainer.log), config.epochs):
            classifier.train()
            while trainer.step < (epoch + 1) * per_epoch:
                x, labels = next(feed)
                if config.noised:
                    t, noise = _step_noise(config.seed, trainer.step, x.shape, schedule.num_steps, device)
                    x = schedule.q_sample(x, t, noise)
                with autocast(device, precision):
                    logits = classifier(x)
                loss = F.cross_entropy(logits.float(), labels)
                trainer.backward(loss)
                trainer.update()
                total += loss.detach()
                on_step(trainer.step)
                if checkpoint.due():
                    random = _random_state(device)  # dropout's
                    checkpoint.save({"trainer": trainer.state_dict(), "epoch_loss": total.cpu(), "random": random})
            row = {
                "epoch": epoch + 1,
                "step": trainer.step,
                "train_loss": total.item() / per_epoch,
                "val_accuracy": accuracy(classifier.eval(), val),
                "learning_rate": trainer.learning_rate,
            }
            trainer.log.append(row)
            on_epoch(row)
            total = torch.zeros((), device=device)
    return freeze(classifier), trainer.log


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's default generators, on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


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
            _, noise = _step_noise(t, first, x.shape, schedule.num_steps, x.device)
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
