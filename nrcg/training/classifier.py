"""Training of a classifier, on clean images or on noised ones, and its accuracy along the noise."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.architectures import build_module, set_momentum
from nrcg.classifiers.logits import predicted_class
from nrcg.classifiers.specs import with_new_head
from nrcg.config import ClassifierConfig, Compile
from nrcg.devices import autocast, freeze
from nrcg.diffusion.compiling import WORTH_STEPS, compile_in_place, resolve_compile
from nrcg.diffusion.noise import spawn_seed
from nrcg.diffusion.schedule import Schedule
from nrcg.training.feed import TrainingImages, batches_from, steps_per_epoch
from nrcg.training.trainer import (
    Checkpoint,
    LogRow,
    OnEpoch,
    OnStep,
    Trainer,
    naming_memory,
    random_state,
    set_random_state,
    step_noise,
)


def fit_classifier(
    config: ClassifierConfig,
    schedule: Schedule,
    train: TrainingImages,
    val: TrainingImages,
    *,
    num_classes: int,
    device: torch.device,
    precision: torch.dtype,
    checkpoint: Checkpoint,
    compile: Compile = "off",
    on_step: OnStep,
    on_epoch: OnEpoch,
    on_resume: OnStep = lambda step: None,
) -> tuple[Classifier, list[LogRow]]:
    """Train a classifier by cross-entropy; a robust one on images noised by eq. 2, each at its own t in 1..T.

    Args:
        compile: the network by torch.compile; auto: on a GPU, where the training has many steps.
        on_resume: called with the number of steps that a checkpoint brings.

    Returns:
        The classifier, frozen, and a row per epoch: epoch, step, train_loss, val_accuracy, learning_rate.
    """
    torch.manual_seed(spawn_seed(config.seed, 0, 3))
    classifier = _start(config, num_classes)
    module = classifier.module.to(device, memory_format=torch.channels_last)
    classifier.to(device)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    if resolve_compile(compile, device, lambda: per_epoch * config.epochs, WORTH_STEPS) != "off":
        compile_in_place(module)
    trainer = Trainer(module, config.optimizer, per_epoch * config.epochs, device, precision)
    total = torch.zeros((), device=device)
    state = checkpoint.load()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        total = state["epoch_loss"].to(device)
        set_random_state(state["random"], device)
        on_resume(trainer.step)
    feed = train.batches(batches_from(len(train), config.batch_size, config.seed, trainer.step, config.epochs))
    with naming_memory("batch_size", f"{config.batch_size} images at once on {device} are too many: take fewer"):
        for epoch in range(len(trainer.log), config.epochs):
            classifier.train()
            while trainer.step < (epoch + 1) * per_epoch:
                x, labels = next(feed)
                if config.noised:
                    t, noise = step_noise(config.seed, trainer.step, x.shape, schedule.num_steps, device)
                    x = schedule.q_sample(x, t, noise)
                with autocast(device, precision):
                    logits = classifier(x)
                loss = F.cross_entropy(logits.float(), labels)
                trainer.backward(loss)
                trainer.update()
                total += loss.detach()
                on_step(trainer.step)
                if checkpoint.due():
                    random = random_state(device)  # dropout's
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


def _start(config: ClassifierConfig, num_classes: int) -> Classifier:
    """The classifier before its first step."""
    if config.init is None:
        return Classifier(build_module(config.architecture, num_classes, config.batch_norm_momentum))
    classifier = with_new_head(config.init, num_classes)
    set_momentum(classifier.module, config.batch_norm_momentum)
    return classifier


@torch.no_grad()
def accuracy(
    classifier: Classifier,
    images: TrainingImages,
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
            _, noise = step_noise(t, first, x.shape, schedule.num_steps, x.device)
            x = schedule.q_sample(x, t, noise)
        right += int((predicted_class(classifier(x)) == labels).sum())
    return right / count


def accuracy_over_t(
    classifier: Classifier, schedule: Schedule, images: TrainingImages, *, num_points: int = 21, num_images: int = 512
) -> list[LogRow]:
    """Accuracy on noised images at evenly spaced t from 0 to T: rows t, accuracy."""
    points = sorted({round(share) for share in np.linspace(0, schedule.num_steps, num_points)})
    return [
        {"t": t, "accuracy": accuracy(classifier, images, schedule=schedule, t=t, num_images=num_images)}
        for t in points
    ]
