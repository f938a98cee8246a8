"""Verbs that make models, and share them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg.cli.arguments import (
    Verbs,
    add_verb,
    choose_device,
    nonnegative,
    positive_or_zero,
    read_settings,
)
from nrcg.config import ROLES, DDPMConfig, StepSettings, TrainClassifierStep, TrainDDPMStep
from nrcg.devices import cuda_uuids, device_name
from nrcg.errors import ConfigError
from nrcg.provenance import versions
from nrcg.steps.common import checked_data, data_tags, log_dataset

if TYPE_CHECKING:
    import torch


def add_train_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "train-ddpm", train_ddpm, step=True, compute=True)
    sub.add_argument(
        "--gpus", type=positive_or_zero, help="GPUs that ddpm.num_processes may use; default: all that are visible"
    )
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/ddpm")


def train_ddpm(arguments: argparse.Namespace) -> int | None:
    """Train the diffusion model, or take a pretrained one."""
    import contextlib

    from nrcg import tracking
    from nrcg.data.arrays import mean_image, open_split
    from nrcg.devices import resolve_device, resolve_precision
    from nrcg.diffusion import storage
    from nrcg.diffusion.unet import build_scheduler
    from nrcg.pipeline.progress import Progress
    from nrcg.training import ddpm, distributed, feed, trainer

    settings: TrainDDPMStep = read_settings(arguments, "train_ddpm")
    config, manifest = settings.ddpm, checked_data(arguments.data)
    if config.pretrained is not None:
        return _import_ddpm(arguments, settings, manifest)
    if not distributed.launched():
        device = resolve_device(arguments.device or settings.device)
        count = distributed.num_processes(config.num_processes, device, arguments.gpus)
        if count > 1:
            return _launch(arguments, device, count)
    ranks, device = distributed.join(choose_device(arguments, settings)[0])
    precision = resolve_precision(settings.precision, device)
    train = feed.Images(*open_split(arguments.data, "train"), device)
    val = feed.Images(*open_split(arguments.data, "val"), device)
    record = _record(settings, manifest, device, precision)
    out = Path(arguments.out)
    checkpoint = trainer.Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), _identity(settings, manifest), config.checkpoint_minutes
    )
    steps = config.epochs * feed.steps_per_epoch(len(train), config.batch_size)
    mean = mean_image(arguments.data)
    with contextlib.ExitStack() as stack:
        run, bar = tracking.NullRun(), None
        if ranks.main:
            params = settings.model_dump() | {"num_processes": ranks.count}
            run = stack.enter_context(
                tracking.run(settings.experiment, "train_ddpm", kind="train", params=params, tags=data_tags(manifest))
            )
            log_dataset(run, manifest, arguments.data, "train", "training")
            log_dataset(run, manifest, arguments.data, "val", "validation")
            bar = stack.enter_context(Progress("train_ddpm", steps, "step"))

        def keep_grid(unet: torch.nn.Module, epoch: int) -> None:
            path = out.with_name(f"{out.name}.samples") / f"epoch{epoch:04d}.png"
            _draw_grid(unet, build_scheduler(config.schedule), config, mean, precision, path)
            run.log_artifact(path, "samples")

        def ignore(*_: object) -> None:
            """The other processes write nothing."""

        unet, log = ddpm.train_ddpm(
            config,
            train,
            val,
            image_size=manifest["image_size"],
            channels=manifest["channels"],
            device=device,
            precision=precision,
            checkpoint=checkpoint,
            on_step=bar.set if bar else ignore,
            on_resume=bar.resume if bar else ignore,
            on_epoch=(lambda row: _log_epoch(run, row)) if ranks.main else ignore,
            on_samples=keep_grid if ranks.main else ignore,
            ranks=ranks,
        )
        ranks.leave()
        if not ranks.main:
            return None
        scheduler = build_scheduler(config.schedule)
        storage.save_pipeline(out, unet, scheduler, mean, record | {"num_processes": ranks.count}, log)
        _draw_grid(unet, scheduler, config, mean, precision, out / "samples.png")
        run.log_artifact(out / "samples.png", "samples")
        run.log_model(out, "ddpm")
    checkpoint.remove()


def _launch(arguments: argparse.Namespace, device: torch.device, count: int) -> int:
    """Run this very command in several processes, each with its own GPU."""
    from nrcg.training import distributed

    environment = {}
    if device.type == "cuda" and os.environ.get("NRCG_WORKFLOW"):
        from nrcg.devices import lease_cuda_devices

        leased = lease_cuda_devices(cuda_uuids(), count)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(max(leased) + 1)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[position] for position in leased)
    return distributed.launch([sys.executable, "-m", "nrcg.cli", *arguments.argv], count, environment)


def _import_ddpm(arguments: argparse.Namespace, settings: TrainDDPMStep, manifest: dict) -> None:
    """A pretrained model into the folder of the trained one, with the data set's mean image."""
    from diffusers.utils import logging

    from nrcg import tracking
    from nrcg.data.arrays import mean_image, open_split
    from nrcg.diffusion import storage
    from nrcg.training import feed, pretrained

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of every key and file name that only old models have
    config, out = settings.ddpm, Path(arguments.out)
    device, precision = choose_device(arguments, settings)
    pipe, origin = pretrained.open_pretrained(config.pretrained)
    pretrained.check_pretrained(
        pipe,
        config.schedule,
        image_size=manifest["image_size"],
        channels=manifest["channels"],
        source=config.pretrained,
    )
    pipe.to(device)
    mean = mean_image(arguments.data)
    params = {"experiment": settings.experiment, "pretrained": origin, "schedule": config.schedule.model_dump()}
    with tracking.run(settings.experiment, "train_ddpm", kind="train", params=params, tags=data_tags(manifest)) as run:
        log_dataset(run, manifest, arguments.data, "train", "mean image")
        log_dataset(run, manifest, arguments.data, "val", "validation")
        row = pretrained.pretrained_row(
            pipe,
            feed.Images(*open_split(arguments.data, "val"), device),
            num_images=config.num_val_images,
            batch_size=min(config.batch_size, _grid_batch(manifest["image_size"])),
            precision=precision,
        )
        run.log_metrics({"val_loss": row["val_loss"]})
        record = _record(settings, manifest, device, precision) | {"pretrained": origin}
        storage.save_pipeline(out, pipe.unet, pipe.scheduler, mean, record, [row])
        _draw_grid(pipe.unet, pipe.scheduler, config, mean, precision, out / "samples.png")
        run.log_artifact(out / "samples.png", "samples")
        run.log_model(out, "ddpm")


def add_train_classifier(verbs: Verbs) -> None:
    sub = add_verb(verbs, "train-classifier", train_classifier, step=True, compute=True)
    sub.add_argument("--role", choices=ROLES, help="which of the experiment's classifiers")
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/classifiers/<role>")


def train_classifier(arguments: argparse.Namespace) -> None:
    """Train one classifier, or take a pretrained one."""
    import torch

    from nrcg import tracking
    from nrcg.classifiers.storage import save_classifier
    from nrcg.csv_files import write_csv
    from nrcg.data.arrays import open_split
    from nrcg.diffusion.schedule import Schedule
    from nrcg.pipeline.progress import Progress
    from nrcg.training import classifier as training_of
    from nrcg.training import feed, trainer

    settings = read_settings(arguments, "train_classifier", arguments.role)
    config, manifest = settings.classifier, checked_data(arguments.data)
    if config.pretrained is not None:
        _import_classifier(arguments, settings, manifest)
        return
    device, precision = choose_device(arguments, settings)
    if device.type == "cpu" and settings.precision == "auto":
        precision = torch.float32  # bfloat16 slows depthwise convolutions down on a CPU
    train = feed.Images(*open_split(arguments.data, "train"), device)
    val = feed.Images(*open_split(arguments.data, "val"), device)
    schedule = Schedule.from_config(settings.schedule)
    out, name = Path(arguments.out), f"train_{settings.role}"
    checkpoint = trainer.Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), _identity(settings, manifest), config.checkpoint_minutes
    )
    steps = config.epochs * feed.steps_per_epoch(len(train), config.batch_size)
    with (
        tracking.run(
            settings.experiment, name, kind="train", params=settings.model_dump(), tags=data_tags(manifest)
        ) as run,
        Progress(f"train_classifier {settings.role}", steps, "step") as bar,
    ):
        log_dataset(run, manifest, arguments.data, "train", "training")
        log_dataset(run, manifest, arguments.data, "val", "validation")
        classifier, log = training_of.train_classifier(
            config,
            schedule,
            train,
            val,
            num_classes=len(manifest["classes"]),
            device=device,
            precision=precision,
            checkpoint=checkpoint,
            on_step=bar.set,
            on_resume=bar.resume,
            on_epoch=lambda row: _log_epoch(run, row),
        )
        over_t = training_of.accuracy_over_t(classifier, schedule, val)
        for row in over_t:
            run.log_metrics({"accuracy_at_t": row["accuracy"]}, step=row["t"])
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "training.csv", log, list(log[0]))
        write_csv(out / "accuracy_over_t.csv", over_t, ["t", "accuracy"])
        save_classifier(
            out,
            classifier.module,
            {
                "architecture": config.architecture,
                "classes": manifest["classes"],
                "image_size": manifest["image_size"],
                "channels": manifest["channels"],
                "batch_norm_momentum": config.batch_norm_momentum,
                "validation_accuracy": log[-1]["val_accuracy"],
                **_record(settings, manifest, device, precision),
            },
        )
        run.log_model(out, settings.role)
    checkpoint.remove()


def _import_classifier(arguments: argparse.Namespace, settings: TrainClassifierStep, manifest: dict) -> None:
    """A classifier by its SPEC into the folder of a trained one, its accuracy measured on the validation images."""
    import torch

    from nrcg import tracking
    from nrcg.classifiers import specs
    from nrcg.classifiers.storage import save_classifier
    from nrcg.csv_files import write_csv
    from nrcg.data.arrays import open_split
    from nrcg.diffusion.schedule import Schedule
    from nrcg.training import classifier as training_of
    from nrcg.training import feed

    config, out = settings.classifier, Path(arguments.out)
    device, _ = choose_device(arguments, settings)
    classifier = specs.load_for_classes(config.pretrained, manifest["classes"], config.class_map).to(device)
    if classifier.channels not in (None, manifest["channels"]):
        raise ConfigError(
            f"classifiers.{settings.role}.pretrained: it takes images of {classifier.channels} channels, the data set"
            f" has {manifest['channels']}"
        )
    params = {"experiment": settings.experiment, "role": settings.role, "classifier": config.model_dump()}
    name = f"train_{settings.role}"
    with tracking.run(settings.experiment, name, kind="train", params=params, tags=data_tags(manifest)) as run:
        log_dataset(run, manifest, arguments.data, "val", "validation")
        val = feed.Images(*open_split(arguments.data, "val"), device)
        accuracy = training_of.accuracy(classifier, val)
        print(f"{config.pretrained}: {100 * accuracy:.1f} % of the validation images right", flush=True)
        run.log_metrics({"val_accuracy": accuracy})
        over_t = training_of.accuracy_over_t(classifier, Schedule.from_config(settings.schedule), val)
        out.mkdir(parents=True, exist_ok=True)
        row = {"epoch": 0, "step": 0, "train_loss": float("nan"), "val_accuracy": accuracy}
        write_csv(out / "training.csv", [row], list(row))
        write_csv(out / "accuracy_over_t.csv", over_t, ["t", "accuracy"])
        record = classifier.record() | {
            "channels": manifest["channels"],
            "image_size": manifest["image_size"],
            "pretrained": config.pretrained,
            "validation_accuracy": accuracy,
        }
        save_classifier(out, classifier.module, record | _record(settings, manifest, device, torch.float32))
        run.log_model(out, settings.role)


def add_export_ddpm(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-ddpm", export_ddpm)
    sub.add_argument("--ddpm", required=True, help="models/<experiment>/ddpm")
    _add_export_arguments(sub, dtype="bfloat16")
    sub.add_argument("--max-shard-mb", type=nonnegative, default=16.0, help="no file of weights is larger")
    sub.add_argument("--name", help="title of the model card; default: the experiment's")


def export_ddpm(arguments: argparse.Namespace) -> None:
    """Write a diffusion model in half precision and small files, with a model card."""
    import torch
    from diffusers.utils import logging

    from nrcg.training.export import export_ddpm

    logging.disable_progress_bar()
    dtype, most = getattr(torch, arguments.dtype), int(1e6 * arguments.max_shard_mb)
    export_ddpm(arguments.ddpm, arguments.out, dtype=dtype, max_shard_bytes=most, name=arguments.name)


def add_export_classifier(verbs: Verbs) -> None:
    sub = add_verb(verbs, "export-classifier", export_classifier)
    sub.add_argument("--classifier", required=True, help="models/<experiment>/classifiers/<role>")
    _add_export_arguments(sub, dtype="float16")


def export_classifier(arguments: argparse.Namespace) -> None:
    """Write a classifier in half precision."""
    import torch

    from nrcg.training.export import export_classifier

    export_classifier(arguments.classifier, arguments.out, dtype=getattr(torch, arguments.dtype))


def _add_export_arguments(sub: argparse.ArgumentParser, *, dtype: str) -> None:
    sub.add_argument("--out", required=True, help="the new folder")
    sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype)


def _draw_grid(unet: Any, scheduler: Any, config: DDPMConfig, mean: Any, precision: Any, path: Path) -> None:
    """A grid of 36 unguided samples by all steps; large ones on a CPU, where that takes hours, are few, by DDIM."""
    import torch

    from nrcg.data.arrays import to_uint8
    from nrcg.data.pictures import sample_grid, save_png
    from nrcg.guidance.pipeline import GuidedDDPMPipeline

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


def _log_epoch(run: Any, row: dict) -> None:
    """An epoch's row into the log file and the tracking run."""
    print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    run.log_metrics({key: value for key, value in row.items() if key not in ("epoch", "step")}, step=int(row["step"]))


def _identity(settings: StepSettings, manifest: dict) -> str:
    """Everything that shapes a training: its settings and the data's checksums."""
    return f"{settings.fingerprint()}-{manifest['splits']['train']['sha256']['images']}"


def _record(settings: StepSettings, manifest: dict, device: torch.device, precision: torch.dtype) -> dict:
    """What made a model: for its folder."""
    return {
        "settings": settings.model_dump(mode="json"),
        "dataset": data_tags(manifest),
        "device": device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "versions": versions(),
    }
