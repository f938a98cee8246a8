"""Training of one classifier, or taking a pretrained one."""

from __future__ import annotations

from pathlib import Path

import torch

from nrcg import tracking
from nrcg.classifiers.specs import load_for_classes
from nrcg.classifiers.storage import save_classifier
from nrcg.config import TrainClassifierStep
from nrcg.csv_files import write_csv
from nrcg.data.arrays import open_split
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import ConfigError
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import checked_data, data_tags, identity, log_dataset, log_epoch, model_record
from nrcg.training.classifier import accuracy, accuracy_over_t, fit_classifier
from nrcg.training.feed import TrainingImages, steps_per_epoch
from nrcg.training.trainer import Checkpoint, LogRow


def train_classifier(
    settings: TrainClassifierStep, *, data: Path, out: Path, device: torch.device, precision: torch.dtype
) -> list[LogRow]:
    """Write one classifier: trained, or by its SPEC.

    Args:
        settings: The role's settings.
        data: Folder of the data set.
        out: Folder to write; a checkpoint stands beside it until it is whole.
        device: Device that computes.
        precision: Autocast of the training.

    Returns:
        The rows of training.csv.
    """
    manifest = checked_data(data)
    if settings.classifier.pretrained is not None:
        return _take_pretrained(settings, manifest, data, out, device)
    config = settings.classifier
    if device.type == "cpu" and settings.precision == "auto":
        precision = torch.float32  # bfloat16 slows depthwise convolutions down on a CPU
    train, val = (TrainingImages(*open_split(data, split), device) for split in ("train", "val"))
    schedule = Schedule.from_config(settings.schedule)
    checkpoint = Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), identity(settings, manifest), config.checkpoint_minutes
    )
    steps = config.epochs * steps_per_epoch(len(train), config.batch_size)
    with (
        tracking.run(
            settings.experiment,
            f"train_{settings.role}",
            kind="train",
            params=settings.model_dump(),
            tags=data_tags(manifest),
        ) as run,
        Progress(f"train_classifier {settings.role}", steps, "step") as bar,
    ):
        log_dataset(run, manifest, data, "train", "training")
        log_dataset(run, manifest, data, "val", "validation")
        classifier, log = fit_classifier(
            config,
            schedule,
            train,
            val,
            num_classes=len(manifest["classes"]),
            device=device,
            precision=precision,
            checkpoint=checkpoint,
            compile=settings.compile,
            on_step=bar.set,
            on_resume=bar.resume,
            on_epoch=lambda row: log_epoch(run, row),
        )
        over_t = accuracy_over_t(classifier, schedule, val)
        for row in over_t:
            run.log_metrics({"accuracy_at_t": row["accuracy"]}, step=row["t"])
        _write_tables(out, log, over_t)
        # Somebody's network is made again by its library, and sees images as that says.
        record = {"architecture": config.architecture} if config.init is None else classifier.record()
        record |= {
            "classes": manifest["classes"],
            "image_size": manifest["image_size"],
            "channels": manifest["channels"],
            "batch_norm_momentum": config.batch_norm_momentum,
            "validation_accuracy": log[-1]["val_accuracy"],
        }
        save_classifier(out, classifier.module, record | model_record(settings, manifest, device, precision))
        run.log_model(out, settings.role)
    checkpoint.remove()
    return log


def _take_pretrained(
    settings: TrainClassifierStep, manifest: dict, data: Path, out: Path, device: torch.device
) -> list[LogRow]:
    """A classifier by its SPEC into the folder of a trained one, its accuracy measured on the validation images."""
    config = settings.classifier
    classifier = load_for_classes(config.pretrained, manifest["classes"], config.class_map).to(device)
    if classifier.channels not in (None, manifest["channels"]):
        raise ConfigError(
            f"classifiers.{settings.role}.pretrained: it takes images of {classifier.channels} channels, the data set"
            f" has {manifest['channels']}"
        )
    params = {"experiment": settings.experiment, "role": settings.role, "classifier": config.model_dump()}
    name, tags = f"train_{settings.role}", data_tags(manifest)
    with tracking.run(settings.experiment, name, kind="train", params=params, tags=tags) as run:
        log_dataset(run, manifest, data, "val", "validation")
        val = TrainingImages(*open_split(data, "val"), device)
        found = accuracy(classifier, val)
        print(f"{config.pretrained}: {100 * found:.1f} % of the validation images right", flush=True)
        run.log_metrics({"val_accuracy": found})
        row = {"epoch": 0, "step": 0, "train_loss": float("nan"), "val_accuracy": found}
        _write_tables(out, [row], accuracy_over_t(classifier, Schedule.from_config(settings.schedule), val))
        record = classifier.record() | {
            "channels": manifest["channels"],
            "image_size": manifest["image_size"],
            "pretrained": config.pretrained,
            "validation_accuracy": found,
        }
        save_classifier(out, classifier.module, record | model_record(settings, manifest, device, torch.float32))
        run.log_model(out, settings.role)
    return [row]


def _write_tables(out: Path, log: list[LogRow], over_t: list[LogRow]) -> None:
    write_csv(out / "training.csv", log, list(log[0]))
    write_csv(out / "accuracy_over_t.csv", over_t, ["t", "accuracy"])
