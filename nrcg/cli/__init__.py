"""The `nrcg` command: one verb for each step of the pipeline, and the sampler for anybody's models.

The only module that knows the command line and the configuration files. Heavy libraries are imported by the verb that
needs them, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from nrcg import __version__
from nrcg.config import (
    ROLES,
    BestBy,
    DDPMConfig,
    EvaluateStep,
    ReferenceStep,
    ReportStep,
    SampleStep,
    StepSettings,
    TrainClassifierStep,
    TrainDDPMStep,
    checked_device,
    format_scale,
    get_experiment,
    load,
    read_step_settings,
    step_settings,
    write_schema,
)
from nrcg.errors import ConfigError, DataError, NrcgError
from nrcg.processes import end_with_parent

if TYPE_CHECKING:
    import torch

    from nrcg.config import ExperimentConfig, ImageData, SportBallsData
    from nrcg.plan import Estimate, Step
    from nrcg.sources import Listing

GRID_SAMPLES = 256
"""Samples in grid.png of `nrcg sample`, as many as the paper's fig. 9 shows."""
DISK_ERRORS = {
    errno.ENOSPC: "free some space there and run it again",
    errno.EDQUOT: "free some space there and run it again",
    errno.EROFS: "nothing can be written there",
    errno.EACCES: "give yourself the right to it",
}
"""Errors of the disk -> their remedy."""
REFERENCE_CACHE = ".nrcg/references"
"""Where features of reference images are kept; safe to delete."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake prints one line and returns 1."""
    _die_with_parent()
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)  # for the processes of a training
    if getattr(arguments, "threads", None):
        # Read by the matrix libraries when they are loaded, so before any import of them.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(arguments.threads)
    try:
        return arguments.verb(arguments) or 0
    except NrcgError as error:
        print(f"nrcg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe such as `nrcg table | head` has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"nrcg: {error.filename or 'a file'}: {error.strerror}; {DISK_ERRORS[error.errno]}", file=sys.stderr)
        return 1


def _die_with_parent() -> None:
    """Under the workflow a job ends with its parent: after a kill -9 of Snakemake it must not write on.

    NRCG_WORKFLOW holds the parent's process number, NRCG_LAUNCHER that of a training's processes. Those that torchrun
    started end with it.
    """
    torchrun = str(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
    parent = os.environ.get("NRCG_LAUNCHER") or torchrun or os.environ.get("NRCG_WORKFLOW")
    if parent:
        end_with_parent(int(parent))


# --- The verbs --------------------------------------------------------------------------------------------------


def validate(arguments: argparse.Namespace) -> None:
    """Check config.yaml."""
    config = load(arguments.config)
    print(f"{arguments.config}: valid; experiments: {', '.join(config.experiments)}")


def schema(arguments: argparse.Namespace) -> None:
    """Write config.schema.json."""
    write_schema(arguments.out)


def dataset(arguments: argparse.Namespace) -> None:
    """Make a data set: draw it, or read, check and convert raw images."""
    from nrcg import tracking
    from nrcg.datasets import load_manifest

    settings = _settings(arguments, "dataset")
    name = f"dataset {settings.dataset.name}"
    with tracking.run(settings.experiment, name, kind="dataset", params=settings.model_dump(), deferred=True) as run:
        if settings.dataset.source == "sportballs":
            _draw_dataset(arguments, settings.dataset)
        else:
            _convert_dataset(arguments, settings.dataset)
        manifest = load_manifest(arguments.out)
        for split in manifest["splits"]:
            _log_dataset(run, manifest, arguments.out, split, "made")


def _draw_dataset(arguments: argparse.Namespace, data: SportBallsData) -> None:
    from nrcg.datasets import write_sportballs
    from nrcg.progress import Progress

    with Progress(f"dataset {data.name}", data.num_train + data.num_val, "image") as bar:
        write_sportballs(
            arguments.out,
            image_size=data.image_size,
            classes=data.classes,
            num_train=data.num_train,
            num_val=data.num_val,
            diameter=tuple(data.diameter),
            seed=data.seed,
            name=data.name,
            workers=arguments.threads,
            progress=lambda done, _: bar.set(done),
        )


def _convert_dataset(arguments: argparse.Namespace, data: ImageData) -> None:
    from nrcg.conversion import convert
    from nrcg.progress import Progress

    try:
        listing = _list_images(data)
    except OSError as error:  # a folder that may not be read
        raise DataError(f"{data.path}: {error}") from error
    for note in listing.notes:
        print(f"{data.path}: {note}", file=sys.stderr, flush=True)
    total = sum(len(split.labels) for split in listing.splits.values())
    try:
        with Progress(f"dataset {data.name}", total, "image") as bar:
            manifest = convert(
                arguments.out,
                listing,
                name=data.name,
                classes=data.classes,
                image_size=data.image_size,
                preprocessing=data.preprocessing,
                max_unreadable=data.max_unreadable,
                settings=data.model_dump(exclude={"name", "classes", "image_size", "preprocessing", "download"}),
                workers=arguments.threads,
                on_resume=bar.resume,
                on_images=bar.set,
            )
    except OSError as error:  # a full disk
        raise DataError(f"{arguments.out}: {error}; what is converted is kept, run it again") from error
    for split, entry in manifest["splits"].items():
        counts = ", ".join(f"{name} {count:,}" for name, count in entry["class_counts"].items())
        print(f"{split}: {entry['num_images']:,} images: {counts}")
    if count := manifest["generation"]["unreadable"]["count"]:
        print(f"{count:,} unreadable files were left out: {Path(arguments.out) / 'unreadable.csv'}")


def _list_images(data: ImageData) -> Listing:
    """The raw images that the configuration names."""
    from nrcg.celeba import list_celeba
    from nrcg.folders import list_folders, list_labelled
    from nrcg.parquet import list_parquet

    limits = {"num_train": data.num_train, "num_val": data.num_val}
    if data.source == "celeba":
        return list_celeba(data.path, attribute=data.attribute, download=data.download, **limits)
    split = {"classes": data.classes, "val_share": data.val_share, "seed": data.seed, **limits}
    if data.source == "huggingface":
        return list_parquet(
            data.path,
            hub_id=data.hub_id,
            revision=data.revision,
            image_column=data.image_column,
            label_column=data.label_column,
            train_split=data.train_split,
            val_split=data.val_split,
            **split,
        )
    if data.labels is None:
        return list_folders(data.path, **split)
    return list_labelled(
        data.path,
        labels=data.labels,
        image_column=data.image_column,
        label_column=data.label_column,
        split_column=data.split_column,
        image_suffix=data.image_suffix,
        **split,
    )


def train_ddpm(arguments: argparse.Namespace) -> int | None:
    """Train the diffusion model, or take a pretrained one."""
    import contextlib

    from nrcg import distributed, tracking, training
    from nrcg.datasets import mean_image, open_split
    from nrcg.diffusion import build_scheduler, resolve_device
    from nrcg.progress import Progress

    settings: TrainDDPMStep = _settings(arguments, "train_ddpm")
    config, manifest = settings.ddpm, _checked_data(arguments.data)
    if config.pretrained is not None:
        return _import_ddpm(arguments, settings, manifest)
    if not distributed.launched():
        device = resolve_device(arguments.device or settings.device)
        count = distributed.num_processes(config.num_processes, device, arguments.gpus)
        if count > 1:
            return _launch(arguments, device, count)
    ranks, device = distributed.join(_device(arguments, settings)[0])
    precision = _precision(arguments, settings, device)
    train = training.Images(*open_split(arguments.data, "train"), device)
    val = training.Images(*open_split(arguments.data, "val"), device)
    record = _record(settings, manifest, device, precision)
    out = Path(arguments.out)
    checkpoint = training.Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), _identity(settings, manifest), config.checkpoint_minutes
    )
    steps = config.epochs * training.steps_per_epoch(len(train), config.batch_size)
    mean = mean_image(arguments.data)
    with contextlib.ExitStack() as stack:
        run, bar = tracking.NullRun(), None
        if ranks.main:
            params = settings.model_dump() | {"num_processes": ranks.count}
            run = stack.enter_context(
                tracking.run(settings.experiment, "train_ddpm", kind="train", params=params, tags=_data_tags(manifest))
            )
            _log_dataset(run, manifest, arguments.data, "train", "training")
            _log_dataset(run, manifest, arguments.data, "val", "validation")
            bar = stack.enter_context(Progress("train_ddpm", steps, "step"))

        def keep_grid(unet: torch.nn.Module, epoch: int) -> None:
            path = out.with_name(f"{out.name}.samples") / f"epoch{epoch:04d}.png"
            _draw_grid(unet, build_scheduler(config.schedule), config, mean, precision, path)
            run.log_artifact(path, "samples")

        def ignore(*_: object) -> None:
            """The other processes write nothing."""

        unet, log = training.train_ddpm(
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
        training.save_pipeline(
            out, unet, scheduler, mean, record | {"num_processes": ranks.count, "mlflow_run_id": run.id}, log
        )
        _draw_grid(unet, scheduler, config, mean, precision, out / "samples.png")
        run.log_artifact(out / "samples.png", "samples")
        run.log_model(out, "ddpm")
    checkpoint.remove()


def _launch(arguments: argparse.Namespace, device: torch.device, count: int) -> int:
    """Run this very command in several processes, each with its own GPU."""
    from nrcg import distributed

    environment = {}
    if device.type == "cuda" and os.environ.get("NRCG_WORKFLOW"):
        from nrcg.devices import lease_cuda_devices

        leased = lease_cuda_devices(_cuda_uuids(), count)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(max(leased) + 1)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[position] for position in leased)
    return distributed.launch([sys.executable, "-m", "nrcg.cli", *arguments.argv], count, environment)


def _import_ddpm(arguments: argparse.Namespace, settings: TrainDDPMStep, manifest: dict) -> None:
    """A pretrained model into the folder of the trained one, with the data set's mean image."""
    from diffusers.utils import logging

    from nrcg import pretrained, tracking, training
    from nrcg.datasets import mean_image, open_split

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of every key and file name that only old models have
    config, out = settings.ddpm, Path(arguments.out)
    device, precision = _device(arguments, settings)
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
    with tracking.run(settings.experiment, "train_ddpm", kind="train", params=params, tags=_data_tags(manifest)) as run:
        row = pretrained.pretrained_row(
            pipe,
            training.Images(*open_split(arguments.data, "val"), device),
            num_images=config.num_val_images,
            batch_size=min(config.batch_size, _grid_batch(manifest["image_size"])),
            precision=precision,
        )
        run.log_metrics({"val_loss": row["val_loss"]})
        record = _record(settings, manifest, device, precision) | {"pretrained": origin, "mlflow_run_id": run.id}
        training.save_pipeline(out, pipe.unet, pipe.scheduler, mean, record, [row])
        _draw_grid(pipe.unet, pipe.scheduler, config, mean, precision, out / "samples.png")
        run.log_artifact(out / "samples.png", "samples")


def train_classifier(arguments: argparse.Namespace) -> None:
    """Train one classifier, or take a pretrained one."""
    import torch

    from nrcg import tracking, training
    from nrcg.classifiers import save_classifier
    from nrcg.datasets import open_split
    from nrcg.diffusion import Schedule
    from nrcg.progress import Progress
    from nrcg.results import write_csv

    settings = _settings(arguments, "train_classifier", arguments.role)
    config, manifest = settings.classifier, _checked_data(arguments.data)
    if config.pretrained is not None:
        _import_classifier(arguments, settings, manifest)
        return
    device, precision = _device(arguments, settings)
    if device.type == "cpu" and settings.precision == "auto":
        precision = torch.float32  # bfloat16 slows depthwise convolutions down on a CPU
    train = training.Images(*open_split(arguments.data, "train"), device)
    val = training.Images(*open_split(arguments.data, "val"), device)
    schedule = Schedule.from_config(settings.schedule)
    out, name = Path(arguments.out), f"train_{settings.role}"
    checkpoint = training.Checkpoint(
        out.with_name(f"{out.name}.checkpoint.pt"), _identity(settings, manifest), config.checkpoint_minutes
    )
    steps = config.epochs * training.steps_per_epoch(len(train), config.batch_size)
    with (
        tracking.run(
            settings.experiment, name, kind="train", params=settings.model_dump(), tags=_data_tags(manifest)
        ) as run,
        Progress(f"train_classifier {settings.role}", steps, "step") as bar,
    ):
        _log_dataset(run, manifest, arguments.data, "train", "training")
        _log_dataset(run, manifest, arguments.data, "val", "validation")
        classifier, log = training.train_classifier(
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
        over_t = training.accuracy_over_t(classifier, schedule, val)
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
                "mlflow_run_id": run.id,
                **_record(settings, manifest, device, precision),
            },
        )
        run.log_model(out, settings.role)
    checkpoint.remove()


def _import_classifier(arguments: argparse.Namespace, settings: TrainClassifierStep, manifest: dict) -> None:
    """A classifier by its SPEC into the folder of a trained one, its accuracy measured on the validation images."""
    import torch

    from nrcg import specs, tracking, training
    from nrcg.classifiers import save_classifier
    from nrcg.datasets import open_split
    from nrcg.diffusion import Schedule
    from nrcg.results import write_csv

    config, out = settings.classifier, Path(arguments.out)
    device, _ = _device(arguments, settings)
    classifier = specs.load_for_classes(config.pretrained, manifest["classes"], config.class_map).to(device)
    if classifier.channels not in (None, manifest["channels"]):
        raise ConfigError(
            f"classifiers.{settings.role}.pretrained: it takes images of {classifier.channels} channels, the data set"
            f" has {manifest['channels']}"
        )
    params = {"experiment": settings.experiment, "role": settings.role, "classifier": config.model_dump()}
    name = f"train_{settings.role}"
    with tracking.run(settings.experiment, name, kind="train", params=params, tags=_data_tags(manifest)) as run:
        val = training.Images(*open_split(arguments.data, "val"), device)
        accuracy = training.accuracy(classifier, val)
        print(f"{config.pretrained}: {100 * accuracy:.1f} % of the validation images right", flush=True)
        run.log_metrics({"val_accuracy": accuracy})
        over_t = training.accuracy_over_t(classifier, Schedule.from_config(settings.schedule), val)
        out.mkdir(parents=True, exist_ok=True)
        row = {"epoch": 0, "step": 0, "train_loss": float("nan"), "val_accuracy": accuracy}
        write_csv(out / "training.csv", [row], list(row))
        write_csv(out / "accuracy_over_t.csv", over_t, ["t", "accuracy"])
        record = classifier.record() | {
            "channels": manifest["channels"],
            "image_size": manifest["image_size"],
            "pretrained": config.pretrained,
            "validation_accuracy": accuracy,
            "mlflow_run_id": run.id,
        }
        save_classifier(out, classifier.module, record | _record(settings, manifest, device, torch.float32))
        run.log_model(out, settings.role)


def forward(arguments: argparse.Namespace) -> None:
    """Forward analysis: figs. 1 to 4."""
    import torch

    from nrcg import stabilizers, tracking
    from nrcg.classifiers import class_index, load_classifier
    from nrcg.config import stabilizer_name
    from nrcg.datasets import load_manifest, open_split, to_unit
    from nrcg.progress import Progress
    from nrcg.results import FORWARD_COLUMNS, write_csv
    from nrcg.sampling import GuidedDDPMPipeline
    from nrcg.sensitivity import forward_analysis

    settings = _settings(arguments, "forward")
    config = settings.forward
    device, precision = _device(arguments, settings)
    pipe = GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device)
    schedule = pipe.schedule()
    models = {role: load_classifier(Path(arguments.classifiers) / role) for role in ("robust", "non_robust")}
    _checked_data(arguments.data)
    images, labels = open_split(arguments.data, "val")
    count = min(config.num_images, len(images))
    smoothing = {
        stabilizer_name(entry): stabilizers.from_config(entry, schedule.num_steps) for entry in config.stabilizers
    }
    with (
        tracking.run(settings.experiment, "forward", kind="forward", params=settings.model_dump()) as run,
        Progress("forward", count * (schedule.num_steps + 1), "step") as bar,
    ):
        _log_dataset(run, load_manifest(arguments.data), arguments.data, "val", "forward analysis")
        rows = forward_analysis(
            to_unit(images[:count]).to(device),
            torch.from_numpy(labels[:count]).to(device),
            classifiers={role: model.to(device) for role, model in models.items()},
            predict_noise=pipe.noise_predictor(precision),
            schedule=schedule,
            stabilizers=smoothing,
            target=class_index(models["non_robust"].classes, settings.target),
            seed=config.seed,
            batch_size=config.batch_size,
            clip_pred_x0=settings.clip_pred_x0,
            on_step=bar.set,
        )
        write_csv(arguments.out, rows, FORWARD_COLUMNS)
        for row in rows:
            run.log_metrics({f"{row['method']}.{key}": row[key] for key in FORWARD_COLUMNS[3:]}, step=row["t"])
        run.log_artifact(arguments.out)


def sample(arguments: argparse.Namespace) -> None:
    """Guided sampling: a shard of the pipeline, or anybody's model and classifier."""
    try:
        if arguments.config is None:
            _sample_own(arguments)
        else:
            _sample_shard(arguments)
    except (ValueError, TypeError) as error:  # a model or setting that the library refuses
        raise ConfigError(" ".join(str(error).split())) from error


def _sample_shard(arguments: argparse.Namespace) -> None:
    """Samples of one shard as uint8 .npy, and beside it what made them."""
    from nrcg import tracking
    from nrcg.classifiers import load_classifier
    from nrcg.shards import weights_hash

    for flag in ("method", "scale", "shard"):
        if getattr(arguments, flag) is None:
            raise ConfigError(f"--{flag}: missing; with --config a shard needs --method, --scale and --shard")
    settings: SampleStep = _settings(arguments, "sample", arguments.method)
    method, config = settings.guidance, settings.sampling
    first = arguments.shard * config.shard_size
    count = min(config.shard_size, config.num_samples - first)
    if count < 1:
        raise ConfigError(f"--shard: {arguments.shard} is past the last of {config.num_samples} samples")
    pipe, device, precision = _pipeline(arguments, settings)
    pipe.use_sampler(method.sampler.name)
    guidance, weights = None, {"ddpm": weights_hash(arguments.ddpm)}
    if method.classifier is not None:
        if arguments.classifier is None:
            raise ConfigError(f"--classifier: missing; method {settings.method} is guided by {method.classifier}")
        guidance = _method_guidance(settings, load_classifier(arguments.classifier), arguments.scale, pipe)
        weights["classifier"] = weights_hash(arguments.classifier)
    label = f"sample {settings.method} scale {format_scale(arguments.scale)}"
    with tracking.run(
        settings.experiment,
        f"{label} shard {arguments.shard}",
        kind="shard",
        params=settings.model_dump() | {"scale": arguments.scale, "shard": arguments.shard, "weights_sha256": weights},
        tags={"method": settings.method},
        deferred=True,
    ) as run:
        _draw_samples(
            arguments.out,
            pipe,
            guidance,
            device,
            precision,
            num_samples=count,
            first_sample=first,
            batch_size=config.batch_size,
            seed=config.seed,
            start=config.start,
            label=label,
            num_inference_steps=method.sampler.steps,
            eta=method.sampler.eta,
            trace=config.trace and guidance is not None and arguments.scale > 0,
            record={
                "experiment": settings.experiment,
                "method": settings.method,
                "scale": arguments.scale,
                "shard": arguments.shard,
                "settings": settings.fingerprint(),
                "weights_sha256": weights,
            },
        )
        record = json.loads(Path(arguments.out).with_suffix(".json").read_text())
        numbers = {key: record[key] for key in ("seconds", "nonfinite", "peak_memory_mib")}
        run.log_metrics(numbers | {"images_per_second": count / record["seconds"]})


def _method_guidance(settings: SampleStep, classifier: Any, scale: float, pipe: Any) -> Any:
    """Guidance as a method of the configuration asks for it, for a pipeline that uses the method's sampler."""
    from nrcg import schedules, stabilizers
    from nrcg.classifiers import class_index
    from nrcg.guidance import ClassifierGuidance

    method = settings.guidance
    return ClassifierGuidance(
        classifier,
        class_index(classifier.classes, settings.target),
        scale=schedules.from_config(method.scale_schedule, scale),
        input=method.input,
        stabilizer=stabilizers.from_config(method.stabilizer, len(pipe.timesteps(method.sampler.steps))),
        clip_pred_x0=settings.sampling.clip_pred_x0,
        grad_mode=method.grad_mode,
        every_k=method.every_k,
        skip_above=method.skip_above,
    )


def _sample_own(arguments: argparse.Namespace) -> None:
    """`nrcg sample --ddpm ... --classifier ... --out DIR`: PNGs, samples.npy and a grid."""
    from PIL import Image

    from nrcg.figures import sample_grid, save_png, save_trace_figure
    from nrcg.trace import Trace

    if arguments.ddpm is None:
        raise ConfigError("--ddpm: missing; give a diffusers folder or hub id")
    guidance = _own_guidance(arguments)
    if arguments.trace and guidance is None:
        raise ConfigError("--trace: nothing guides; give --classifier")
    pipe, device, precision = _pipeline(arguments, None)
    pipe.use_sampler(arguments.sampler)
    out = Path(arguments.out)
    # What was asked for, as the flags name it.
    asked = (
        *("ddpm", "classifier", "target", "scale", "scale_schedule", "input", "stabilizer", "grad_mode", "every_k"),
        *("skip_above", "clip_pred_x0", "sampler", "eta"),
    )
    images = _draw_samples(
        out / "samples.npy",
        pipe,
        guidance,
        device,
        precision,
        num_samples=arguments.num_samples,
        first_sample=0,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        start=arguments.start,
        label="sample",
        record={name: getattr(arguments, name) for name in asked},
        num_inference_steps=arguments.steps,
        eta=arguments.eta,
        trace=arguments.trace,
    )
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(out / f"{index:05d}.png")
    save_png(out / "grid.png", sample_grid(images[:GRID_SAMPLES], max(1, round(min(len(images), GRID_SAMPLES) ** 0.5))))
    traced = ""
    if arguments.trace:
        save_trace_figure(out / "trace.png", Trace.load(out / "samples.trace.npz"))
        traced = ", samples.trace.npz, trace.png"
    print(f"{len(images)} samples in {out}: samples.npy, grid.png{traced}, {0:05d}.png ...")


def _own_guidance(arguments: argparse.Namespace) -> Any:
    """Guidance as the flags of `nrcg sample` ask for it, or None."""
    from nrcg import schedules, stabilizers
    from nrcg.classifiers import class_index
    from nrcg.guidance import ClassifierGuidance
    from nrcg.specs import load_classifier

    try:
        stabilizer = stabilizers.parse(arguments.stabilizer)
    except ValueError as error:
        raise ConfigError(f"--stabilizer: {error}") from None
    try:
        scale = schedules.parse(arguments.scale_schedule, 1.0 if arguments.scale is None else arguments.scale)
    except ValueError as error:
        raise ConfigError(f"--scale-schedule: {error}") from None
    if arguments.classifier is None:
        return None
    classifier = load_classifier(arguments.classifier)
    if arguments.target is None:
        names = f"{', '.join(classifier.classes[:20])} or a number" if classifier.classes else "a number"
        raise ConfigError(f"--target: missing; allowed: {names}")
    if classifier.classes is not None:
        target = class_index(classifier.classes, arguments.target)
    elif arguments.target.isdecimal():
        target = int(arguments.target)
    else:
        raise ConfigError(f"--target: {arguments.target!r}: the classifier's classes have no names; give a number")
    return ClassifierGuidance(
        classifier,
        target,
        scale=scale,
        input=arguments.input,
        stabilizer=stabilizer,
        clip_pred_x0=arguments.clip_pred_x0,
        grad_mode=arguments.grad_mode,
        every_k=arguments.every_k,
        skip_above=arguments.skip_above,
    )


def reference(arguments: argparse.Namespace) -> None:
    """What every method is compared with: features of the training images, and how good the classifiers are."""
    from nrcg.evaluation import describe_reference
    from nrcg.files import write_record

    settings: ReferenceStep = _settings(arguments, "reference")
    _checked_data(arguments.data)
    device, _ = _device(arguments, settings)
    record = describe_reference(
        settings, Path(arguments.data), Path(arguments.classifiers), Path(arguments.cache), device
    )
    write_record(arguments.out, record)


def evaluate(arguments: argparse.Namespace) -> None:
    """Metrics of one method over its scales, or of anybody's images."""
    if arguments.config is None:
        try:
            _evaluate_own(arguments)
        except (ValueError, TypeError) as error:  # a setting that the library refuses
            raise ConfigError(" ".join(str(error).split())) from error
        return
    from nrcg import tracking
    from nrcg.evaluation import evaluate_method, read_reference_record
    from nrcg.results import write_csv

    for flag in ("method", "scales", "data", "classifiers", "out"):
        if getattr(arguments, flag) is None and (flag != "method" or arguments.experiment):
            raise ConfigError(f"--{flag}: missing; with --config it is needed")
    settings: EvaluateStep = _settings(arguments, "evaluate", arguments.method)
    data, manifest = Path(arguments.data), _checked_data(arguments.data)
    device, _ = _device(arguments, settings)
    tags = {"method": settings.method, "dataset": manifest["name"], "nrcg.step": "1000 x scale"}
    with tracking.run(
        settings.experiment, settings.method, kind=tracking.KIND_METHOD, params=settings.model_dump(), tags=tags
    ) as run:
        _log_dataset(run, manifest, data, "train", "reference")
        rows, columns = evaluate_method(
            settings,
            Path(arguments.samples),
            data,
            Path(arguments.classifiers),
            arguments.scales,
            device,
            record=read_reference_record(Path(arguments.reference)),
            cache=Path(arguments.cache),
            ddpm=None if arguments.ddpm is None else Path(arguments.ddpm),
        )
        tracking.log_method_over_scales(run, rows)
        write_csv(arguments.out, rows, columns)


def _evaluate_own(arguments: argparse.Namespace) -> None:
    """`nrcg evaluate --samples ... --reference ...`: a table, and JSON or CSV."""
    import contextlib
    import math

    from nrcg.files import atomic_write_text
    from nrcg.own_images import evaluate_own, open_side
    from nrcg.progress import Progress
    from nrcg.results import format_interval, format_number, write_csv

    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and out.suffix not in (".json", ".csv"):
        raise ConfigError(f"--out: {out}: must end in .json or .csv")
    for flag in ("method", "experiment", "scales", "data", "classifiers", "ddpm"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag}: belongs to an experiment; give its --config")
    samples = open_side(arguments.samples, image_size=arguments.image_size)
    reference = open_side(arguments.reference, labels=arguments.reference_labels, image_size=arguments.image_size)
    device, _ = _device(arguments, None)
    with contextlib.ExitStack() as stack:
        row, warnings = evaluate_own(
            samples,
            reference,
            features=arguments.features,
            weights_dir=arguments.weights_dir,
            classifier=arguments.classifier,
            target=arguments.target,
            num_samples=arguments.num_samples,
            num_pairwise=arguments.num_pairwise or None,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=device,
            on_plan=lambda total: stack.enter_context(Progress("evaluate", total, "image")).set,
        )
    measured = [name for name in row if f"{name}_lo" in row]
    _print_table(
        [("metric", "value", "95 % interval")]
        + [(name, format_number(row[name]), format_interval(row, name)) for name in measured]
    )
    print()
    for name in row:
        if name not in measured and name.removesuffix("_lo").removesuffix("_hi") not in measured and row[name] != "":
            print(f"{name}: {row[name]}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if out is None:
        return
    if out.suffix == ".csv":
        row["warnings"] = " | ".join(warnings)
        write_csv(out, [row], list(row))
    else:
        plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        atomic_write_text(out, json.dumps(plain | {"warnings": warnings}, indent=2, allow_nan=False) + "\n")


def tune(arguments: argparse.Namespace) -> None:
    """Search for the best guidance scale of a method."""
    from nrcg import tune as search
    from nrcg.files import atomic_write_text, exclusive

    config = load(arguments.config)
    experiment = get_experiment(config, arguments.experiment)
    sampled: SampleStep = step_settings(config, arguments.experiment, "sample", arguments.method)
    evaluated: EvaluateStep = step_settings(config, arguments.experiment, "evaluate", arguments.method)
    if sampled.guidance.classifier is None:
        raise ConfigError(f"--method: nothing guides {arguments.method}, so it has no scale")
    for settings in (sampled, evaluated):
        settings.sampling.num_samples = arguments.num_samples
    low, high = search.scale_range(experiment.sweep.get(arguments.method, []))
    low, high = low if arguments.low is None else arguments.low, high if arguments.high is None else arguments.high
    search.check_range(low, high)
    data, models = Path("data") / experiment.dataset.name, Path("models") / arguments.experiment
    needed = [data / "dataset.json", models / "ddpm" / "model_index.json"]
    needed += [models / "classifiers" / role / "config.json" for role in ("judge", sampled.guidance.classifier)]
    missing = [path.as_posix() for path in needed if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: not there; run: snakemake {' '.join(missing)} --cores all --resources gpu=1")
    folder = Path("results") / arguments.experiment / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    best_by = experiment.evaluation.best_by
    with exclusive(
        folder / f".{arguments.method}.lock", f"{folder}: {arguments.method} is being tuned by another process"
    ):
        try:
            rows = _tune_method(arguments, sampled, evaluated, data, models, low, high, best_by, folder)
        except (ValueError, TypeError) as error:  # a model or setting that the library refuses
            raise ConfigError(" ".join(str(error).split())) from error
    best = search.best_row(rows, best_by)
    block = search.yaml_block(arguments.experiment, arguments.method, best["scale"])
    out = Path(arguments.out) if arguments.out else folder / f"{arguments.method}.yaml"
    atomic_write_text(out, block)
    _print_table(search.table(rows, best_by))
    for note in search.notes(rows, best_by, low, high):
        print(f"note: {note}")
    print(f"\n{out}:\n{block}", end="")


def _tune_method(
    arguments: argparse.Namespace,
    sampled: SampleStep,
    evaluated: EvaluateStep,
    data: Path,
    models: Path,
    low: float,
    high: float,
    best_by: str,
    folder: Path,
) -> list[dict]:
    """The rows of a search; one tracking run with a step per scale."""
    import math
    import tempfile

    from nrcg import tracking
    from nrcg.classifiers import class_index, load_classifier
    from nrcg.config import fingerprint
    from nrcg.datasets import load_manifest
    from nrcg.evaluation import evaluate_images, open_references
    from nrcg.shards import weights_hash
    from nrcg.tune import search

    classifiers, method, sampling = models / "classifiers", sampled.guidance, sampled.sampling
    arguments.ddpm = str(models / "ddpm")
    pipe, device, precision = _pipeline(arguments, sampled)
    pipe.use_sampler(method.sampler.name)
    roles = (method.classifier, "judge")
    guide, judge = (load_classifier(classifiers / role).to(device) for role in roles)
    target = class_index(judge.classes, sampled.target)
    manifest = load_manifest(data)
    extractors, references = open_references(evaluated, data, classifiers, Path(REFERENCE_CACHE), device)
    key = {
        "sample": sampled.fingerprint(),
        "evaluate": evaluated.fingerprint(),
        "weights": [weights_hash(models / "ddpm"), *(weights_hash(classifiers / role) for role in roles)],
        "precision": str(precision),
        "references": [reference.identity for reference in references],
    }

    def measure(scale: float) -> dict:
        """One sampling run with the experiment's seeds, the same for every scale, and one evaluation."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "samples.npy"
            images = _draw_samples(
                path,
                pipe,
                _method_guidance(sampled, guide, scale, pipe),
                device,
                precision,
                num_samples=sampling.num_samples,
                first_sample=0,
                batch_size=sampling.batch_size,
                seed=sampling.seed,
                start=sampling.start,
                label=f"tune {sampled.method} scale {format_scale(scale)}",
                num_inference_steps=method.sampler.steps,
                eta=method.sampler.eta,
                record={},
            )
            record = json.loads(path.with_suffix(".json").read_text())
        row = evaluate_images(images, references, extractors, target=target, judge=judge, guide=guide, device=device)
        return row | {"nonfinite": record["nonfinite"], "images_per_second": len(images) / record["seconds"]}

    params = {
        "method": sampled.method,
        "low": low,
        "high": high,
        "budget": arguments.budget,
        "best_by": best_by,
        "settings": evaluated.model_dump(),
    }
    tags = _data_tags(manifest) | {"method": sampled.method}
    name = f"tune {sampled.method}"
    with tracking.run(sampled.experiment, name, kind="tune", params=params, tags=tags) as run:

        def keep(row: dict, number: int) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            run.log_metrics({key: value for key, value in numbers.items() if math.isfinite(value)}, step=number)
            print(f"{number + 1} of at most {arguments.budget}: scale {format_scale(row['scale'])}", flush=True)

        rows = search(
            measure,
            low=low,
            high=high,
            budget=arguments.budget,
            best_by=best_by,
            journal=folder / f"{sampled.method}.csv",
            settings=fingerprint(key),
            on_row=keep,
        )
        run.log_artifact(folder / f"{sampled.method}.csv")
    return rows


def collect(arguments: argparse.Namespace) -> None:
    """Join the methods' metrics into metrics.csv and summary.json."""
    from nrcg.results import check_comparable, extractor, read_metrics, summarize, write_csv

    tables = {path: read_metrics(path) for path in arguments.metrics}
    extractors = {path: extractor(rows) for path, rows in tables.items()}
    if len(set(extractors.values())) > 1:
        raise DataError(f"features differ and cannot be compared: {extractors}; evaluate every method anew")
    rows = [row | {"best_by": arguments.best_by} for rows in tables.values() for row in rows]
    check_comparable(rows, [path for path, own in tables.items() for _ in own])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(arguments.out, rows, columns)
    if arguments.summary:
        from nrcg.files import atomic_write_text

        atomic_write_text(arguments.summary, json.dumps(summarize(rows), indent=2) + "\n")


def figures(arguments: argparse.Namespace) -> None:
    """Draw the figures."""
    from nrcg.figures import make_figures

    settings: ReportStep = _settings(arguments, "report")
    make_figures(
        arguments.forward,
        arguments.metrics,
        arguments.samples,
        arguments.out,
        target=settings.target,
        num_classes=len(settings.classes),
    )


def report(arguments: argparse.Namespace) -> None:
    """Write the self-contained HTML report."""
    from nrcg import tracking
    from nrcg.report import write_report

    settings: ReportStep = _settings(arguments, "report")
    write_report(
        arguments.out,
        context={
            "experiment": settings.experiment,
            "description": settings.description,
            "target": settings.target,
            "classes": settings.classes,
            "T": settings.ddpm.schedule.num_train_timesteps,
            "num_samples": settings.sampling.num_samples,
            "start": settings.sampling.start,
            "dataset": settings.dataset.name,
            "source": settings.dataset.source,
            "commit": tracking.git_commit(),
            "versions": _versions(),
            "settings": settings.model_dump(mode="json"),
        },
        forward_csv=arguments.forward,
        metrics_csv=arguments.metrics,
        figures_dir=arguments.figures,
        samples_dir=arguments.samples,
        models_dir=arguments.models,
        reference_json=arguments.reference,
        comparison_md=arguments.comparison,
    )
    with tracking.run(settings.experiment, "report", kind="report", params=settings.model_dump(), deferred=True) as run:
        for path in (arguments.out, arguments.forward, arguments.metrics):
            run.log_artifact(path)
        for path in sorted(Path(arguments.figures).glob("*.png")):
            run.log_artifact(path, "figures")


def import_released(arguments: argparse.Namespace) -> None:
    """Check and convert the paper's released models and reference statistics."""
    from diffusers.utils import logging

    from nrcg import released

    logging.disable_progress_bar()
    device, _ = _device(arguments, None)
    done = released.import_released(
        Path(arguments.path),
        Path(arguments.models),
        data=Path(arguments.data),
        experiments=load(arguments.config).experiments if Path(arguments.config).exists() else {},
        assign=arguments.assign,
        classes=dict(map(_class_list, arguments.classes)),
        device=device,
        versions=_versions(),
        replace=arguments.replace,
        dry_run=arguments.dry_run,
    )
    _print_table([("what", "from", "to", "found"), *done.rows])
    if done.ignored:
        print()
        _print_table([("ignored", "why"), *done.ignored])
    for note in done.notes:
        print(f"\n{note}")
    if arguments.dry_run:
        print("\nNothing was written (--dry-run).")


def export_ddpm(arguments: argparse.Namespace) -> None:
    """Write a diffusion model in half precision and small files, with a model card."""
    import torch
    from diffusers.utils import logging

    from nrcg.export import export_ddpm

    logging.disable_progress_bar()
    dtype, most = getattr(torch, arguments.dtype), int(1e6 * arguments.max_shard_mb)
    export_ddpm(arguments.ddpm, arguments.out, dtype=dtype, max_shard_bytes=most, name=arguments.name)


def export_classifier(arguments: argparse.Namespace) -> None:
    """Write a classifier in half precision."""
    import torch

    from nrcg.export import export_classifier

    export_classifier(arguments.classifier, arguments.out, dtype=getattr(torch, arguments.dtype))


def _class_list(text: str) -> tuple[str, list[str]]:
    """celeba=female,male"""
    experiment, _, names = text.partition("=")
    listed = names.split(",")
    if not experiment or len(listed) < 2 or not all(listed) or len(set(listed)) < len(listed):
        raise ConfigError(f"--classes {text}: expected EXPERIMENT=NAME,NAME with different names")
    return experiment, listed


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def compare(arguments: argparse.Namespace) -> None:
    """Print the comparison table of experiments, from MLflow or from metrics.csv."""
    from nrcg.results import format_comparison, format_table

    sources = arguments.experiments or ["quickstart"]
    tables, notes = {}, []
    for source in sources:
        tables[source], note = _read_source(source, files=arguments.files)
        notes.append(f"{source}: {note}")
    print(format_table(tables[sources[0]]) if len(tables) == 1 else format_comparison(tables))
    print("", *notes, sep="\n")


def _read_source(source: str, files: bool) -> tuple[list[dict], str]:
    """Rows of EXPERIMENT or REVISION:EXPERIMENT and where they come from: MLflow's newest runs of that branch, else
    the metrics.csv of the working tree or revision."""
    from nrcg import tracking
    from nrcg.results import frechet_columns, parse_metrics, read_metrics

    revision, _, experiment = source.rpartition(":")
    path = f"results/{experiment}/metrics.csv"
    if not files:
        branch = revision or tracking.git_branch()
        try:
            rows = tracking.read_rows(experiment, branch)
            if rows and frechet_columns(rows):
                note = f"newest runs of branch {branch} in MLflow; charts: {tracking.charts_url(experiment)}"
                if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
                    note += "\n  (after: mlflow ui --backend-store-uri sqlite:///mlflow.db)"
                return rows, note
        except NrcgError as error:
            print(f"nrcg: {error}; reading {path}", file=sys.stderr)
    if not revision:
        return read_metrics(path), path
    text = tracking.git_file(revision, path)
    if text is None:
        raise DataError(f"{source}: git has no {path} at {revision}, and MLflow no finished runs of it")
    return parse_metrics(text, f"{revision}:{path}"), f"{path} of git revision {revision}"


def track(arguments: argparse.Namespace) -> int:
    """Send to MLflow what is missing there, after the store was down or a job was killed."""
    from nrcg import tracking

    if arguments.finish:
        # At a workflow's end, which must not fail by its tracking.
        try:
            done = tracking.finish_invocation(arguments.finish, arguments.status)
        except NrcgError as error:
            print(f"nrcg: warning: {error}", file=sys.stderr)
            return 0
    else:
        done = tracking.sync()
        print(f"{done.runs} run{'' if done.runs == 1 else 's'} sent" if done.runs else "nothing is missing")
    for line in done.failed:
        print(f"nrcg: not sent: {line}", file=sys.stderr)
    return int(bool(done.failed) and not arguments.finish)


def _print_results(experiment: str) -> None:
    from nrcg.results import format_table, read_metrics

    folder = Path("results") / experiment
    print(format_table(read_metrics(folder / "metrics.csv")))
    if (folder / "report.html").exists():
        print(f"\nReport: {(folder / 'report.html').resolve()}")


def adopt(arguments: argparse.Namespace) -> None:
    """Take over the files that `dvc pull` brought: checks their checksums and settings against dvc.lock, then tells
    Snakemake that they are up to date."""
    from nrcg.config import read_yaml

    _use_this_environment()
    status = subprocess.run(["dvc", "status", "--json"], capture_output=True, text=True)
    try:
        stale = json.loads(status.stdout)
    except ValueError:
        raise DataError(f"dvc status fails: {' '.join((status.stderr or status.stdout).split())[-500:]}") from None
    if stale:
        raise DataError(
            f"files or settings are not those of dvc.lock, in the stages {', '.join(stale)}; nothing was taken over. "
            "See `dvc status`; `dvc pull` brings missing files, `dvc repro` makes them anew"
        )
    experiments = [name for entry in read_yaml("dvc.yaml")["vars"] for name in entry.get("experiments", ())]
    touched = subprocess.run(
        # The workflow's own profile prints every command.
        ["snakemake", *experiments, "--touch", "--forceall", "--cores", "1", "--quiet", "all"],
        capture_output=True,
        text=True,
    )
    if touched.returncode:
        raise DataError(f"snakemake --touch fails: {' '.join((touched.stdout + touched.stderr).split())[-500:]}")
    print(f"up to date: {', '.join(experiments)}")


def plan(arguments: argparse.Namespace) -> None:
    """Estimate an experiment before it starts: jobs, images, U-Net passes, hours, disk."""
    from nrcg.config import get_experiment
    from nrcg.plan import image_counts, make_plan, plan_notes, plan_rows

    config = load(arguments.config)
    settings = get_experiment(config, arguments.experiment)
    steps = make_plan(config, arguments.experiment)
    estimate = _measured(arguments, settings, steps) if arguments.measure else None
    _print_table(plan_rows(steps, estimate))
    print()
    counts = image_counts(settings.dataset, Path("data") / settings.dataset.name)
    for note in plan_notes(settings, steps, estimate, counts):
        print(note)


def _measured(arguments: argparse.Namespace, settings: ExperimentConfig, steps: Sequence[Step]) -> Estimate:
    """What the steps' operations cost on the device at hand."""
    from nrcg.plan import Estimate, find_unet

    print("measuring ...", file=sys.stderr, flush=True)
    began, busy = time.perf_counter(), time.process_time()
    import diffusers.models  # noqa: F401  what a job imports
    import torch
    import torchvision.models  # noqa: F401

    from nrcg import timing
    from nrcg.diffusion import resolve_device, resolve_precision

    start = time.process_time() - busy
    device = resolve_device(arguments.device or settings.device)
    precision = resolve_precision(settings.precision, device)
    on_cpu = device.type == "cpu"
    costs, notes = timing.measure(
        settings,
        sorted({operation for step in steps for operation in step.work}),
        unet=find_unet(settings.ddpm, Path("models") / arguments.experiment / "ddpm"),
        device=device,
        precision=precision,
        classifier_precision=torch.float32 if on_cpu and settings.precision == "auto" else precision,
    )
    cores = timing.processors() if on_cpu else None
    name = f"{cores} CPU cores" if on_cpu else f"one {_device_name(device)}"
    seconds = time.perf_counter() - began
    how = f"hours: measured in {seconds:.0f} s on {name}, U-Net in {str(precision).removeprefix('torch.')}"
    return Estimate(costs | {"start": start}, name, cores, [how, *notes])


def run(arguments: argparse.Namespace) -> int:
    """Run Snakemake with bars instead of pages of log."""
    from nrcg.plan import job_weights
    from nrcg.progress import watch

    weights = job_weights(load("config.yaml"), arguments.experiment)
    _use_this_environment()
    # The target stands first: --resources takes every word after it.
    command = ["snakemake", arguments.experiment, "--cores", "all", "--resources", "gpu=1", *arguments.snakemake]
    log = Path("logs") / f"{arguments.experiment}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    code = watch(command, log, weights=weights)
    if code == 0 and not {"-n", "--dry-run"} & set(arguments.snakemake):
        _print_results(arguments.experiment)
    return code


# --- What the verbs share ---------------------------------------------------------------------------------------


def _use_this_environment() -> None:
    """Snakemake and DVC of this environment, also where it is not activated."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _settings(arguments: argparse.Namespace, step: str, part: str | None = None) -> Any:
    return read_step_settings(arguments.config, step, arguments.experiment, part)


def _checked_data(folder: str) -> dict:
    """A data set's manifest, after its arrays were compared with its checksums. Unchanged files are not read again."""
    from nrcg.datasets import load_manifest, verify
    from nrcg.integrity import Sums

    verify(folder, sha256=Sums().sha256)
    return load_manifest(folder)


def _device(arguments: argparse.Namespace, settings: StepSettings | None) -> tuple[torch.device, torch.dtype]:
    """Device and precision: the flags', else the settings'. Also sets the number of threads."""
    import torch

    from nrcg.diffusion import resolve_device
    from nrcg.distributed import launched

    if launched():  # the processes of a training share the threads
        threads = arguments.threads or os.cpu_count() or 1
        torch.set_num_threads(max(threads // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), 1))
    elif arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device or getattr(settings, "device", "auto"))
    if device.type == "cuda" and device.index is None and os.environ.get("NRCG_WORKFLOW") and not launched():
        from nrcg.devices import lease_cuda_device

        device = torch.device("cuda", lease_cuda_device(_cuda_uuids()))
    return device, _precision(arguments, settings, device)


def _precision(arguments: argparse.Namespace, settings: StepSettings | None, device: torch.device) -> torch.dtype:
    from nrcg.diffusion import resolve_precision

    precision = getattr(arguments, "precision", None) or getattr(settings, "precision", "float32")
    return resolve_precision(precision, device)


def _cuda_uuids() -> list[str]:
    """The visible GPUs' names, the same in every process whatever each of them sees."""
    import torch

    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def _pipeline(arguments: argparse.Namespace, settings: StepSettings | None) -> tuple[Any, torch.device, torch.dtype]:
    from diffusers.utils import logging

    from nrcg.sampling import GuidedDDPMPipeline

    logging.disable_progress_bar()  # a bar for two files
    device, precision = _device(arguments, settings)
    if arguments.ddpm is None:
        raise ConfigError("--ddpm: missing; give the folder of the diffusion model")
    return GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device), device, precision


def _draw_samples(
    path: str | Path,
    pipe: Any,
    guidance: Any,
    device: torch.device,
    precision: torch.dtype,
    *,
    num_samples: int,
    first_sample: int,
    batch_size: int | str,
    seed: int,
    start: str,
    label: str,
    record: dict,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    trace: bool = False,
) -> Any:
    """Draw samples, write them as uint8 (N, H, W, C) to `path` and their record beside it; returns them."""
    import torch

    from nrcg.datasets import to_uint8
    from nrcg.files import atomic_save_array, sha256_file, write_record
    from nrcg.progress import Progress

    path = Path(path)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Progress(label, len(pipe.timesteps(num_inference_steps)) * num_samples, "step") as bar:
        out = pipe(
            num_samples=num_samples,
            batch_size=batch_size,
            seed=seed,
            guidance=guidance,
            first_sample=first_sample,
            start=start,
            num_inference_steps=num_inference_steps,
            eta=eta,
            precision=precision,
            trace=trace,
            on_step=bar.set,
        )
    if out.trace is not None:
        out.trace.save(path.with_suffix(".trace.npz"))
    images = to_uint8(out.samples)
    atomic_save_array(path, images)
    record = record | {
        "first_sample": first_sample,
        "num_samples": num_samples,
        "seed": seed,
        "start": start,
        "num_inference_steps": num_inference_steps,
        "precision": str(precision).removeprefix("torch."),
        "device": _device_name(device),
        "nonfinite": int(out.nonfinite.sum()),
        "seconds": out.seconds,
        "peak_memory_mib": _peak_memory_mib(device),
        "sha256": sha256_file(path),
        "versions": _versions(),
    }
    write_record(path.with_suffix(".json"), record)
    return images


def _grid_batch(image_size: int) -> int:
    """Samples at once of a grid: the memory of 36 at 64 x 64."""
    return min(max(36 * 64**2 // image_size**2, 1), 36)


def _draw_grid(unet: Any, scheduler: Any, config: DDPMConfig, mean: Any, precision: Any, path: Path) -> None:
    """A grid of 36 unguided samples by all steps; large ones on a CPU, where that takes hours, are few, by DDIM."""
    import torch

    from nrcg.datasets import to_uint8
    from nrcg.figures import sample_grid, save_png
    from nrcg.sampling import GuidedDDPMPipeline

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


def _log_epoch(run: Any, row: dict) -> None:
    """An epoch's row into the log file and the tracking run."""
    print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    run.log_metrics({key: value for key, value in row.items() if key not in ("epoch", "step")}, step=int(row["step"]))


def _log_dataset(run: Any, manifest: dict, folder: str | Path, split: str, context: str) -> None:
    """A split as an input of the tracking run."""
    record, size = manifest["splits"][split], manifest["image_size"]
    run.log_dataset(
        name=f"{manifest['name']}/{split}",
        path=Path(folder) / split,
        sha256=record["sha256"]["images"],
        shape=(record["num_images"], size, size, manifest["channels"]),
        classes=manifest["classes"],
        context=context,
    )


def _identity(settings: StepSettings, manifest: dict) -> str:
    """Everything that shapes a training: its settings and the data's checksums."""
    return f"{settings.fingerprint()}-{manifest['splits']['train']['sha256']['images']}"


def _data_tags(manifest: dict) -> dict[str, str]:
    return {"dataset": manifest["name"], "dataset_sha256": manifest["splits"]["train"]["sha256"]["images"]}


def _record(settings: StepSettings, manifest: dict, device: torch.device, precision: torch.dtype) -> dict:
    """What made a model: for its folder."""
    return {
        "settings": settings.model_dump(mode="json"),
        "dataset": _data_tags(manifest),
        "device": _device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "diffusers", "torchvision", "numpy")
    return {"nrcg": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the CUDA allocator, or the process's resident set on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --- The command line -------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nrcg: {message}; see: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nrcg", description="Classifier guidance for non-robust classifiers.")
    parser.add_argument("--version", action="version", version=f"nrcg {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, verb: Callable, *, step: bool = False, compute: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=(verb.__doc__ or "").splitlines()[0], description=verb.__doc__)
        sub.set_defaults(verb=verb)
        if step:
            sub.add_argument("--config", required=True, help="config.yaml, or a step's settings file")
            sub.add_argument("--experiment", help="which experiment of config.yaml")
        if compute:
            sub.add_argument("--device", type=_device_flag, help="auto, cpu, cuda, cuda:N; default: the config's")
            sub.add_argument("--threads", type=_positive, help="CPU threads")
        return sub

    sub = add("run", run)
    sub.add_argument("experiment", nargs="?", default="quickstart")
    sub.add_argument("snakemake", nargs=argparse.REMAINDER, help="further arguments for Snakemake")
    sub = add("plan", plan)
    sub.add_argument("experiment", nargs="?", default="quickstart")
    sub.add_argument("--config", default="config.yaml")
    sub.add_argument("--device", type=_device_flag, help="auto, cpu, cuda, cuda:N; default: the config's")
    sub.add_argument(
        "--no-measure", dest="measure", action="store_false", help="only count: answers at once, without hours"
    )
    sub = add("validate", validate)
    sub.add_argument("--config", default="config.yaml")
    sub = add("schema", schema)
    sub.add_argument("--out", default="config.schema.json")
    sub = add("import-released", import_released, compute=True)
    sub.add_argument("path", metavar="PATH", help="a clone of the paper's repository, or any folder with such files")
    sub.add_argument("--models", default="models", help="folder to write to; default: models")
    sub.add_argument("--data", default="data", help="folder of the data sets; default: data")
    sub.add_argument("--config", default="config.yaml", help="whose experiments' data and schedule are compared")
    sub.add_argument(
        "--assign", action="append", default=[], metavar="FILE=EXPERIMENT/ROLE", help="what a file is, or FILE=ignore"
    )
    sub.add_argument(
        "--classes", action="append", default=[], metavar="EXPERIMENT=NAME,NAME", help="class names in their order"
    )
    sub.add_argument("--replace", action="store_true", help="also models that were trained here")
    sub.add_argument("--dry-run", action="store_true", help="check and print, write nothing")
    add("adopt", adopt)
    sub = add("compare", compare)
    sub.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: quickstart; REVISION:EXPERIMENT: of a git branch"
    )
    sub.add_argument("--files", action="store_true", help="from metrics.csv, without MLflow")
    sub = add("track", track)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--sync", action="store_true", help="send what is missing")
    what.add_argument("--finish", metavar="INVOCATION", help="end the parent run; the workflow's last step")
    sub.add_argument("--status", choices=("FINISHED", "FAILED", "KILLED"), default="FINISHED", help="with --finish")
    for name, verb, what in (
        ("export-ddpm", export_ddpm, "models/<experiment>/ddpm"),
        ("export-classifier", export_classifier, "models/<experiment>/classifiers/<role>"),
    ):
        sub = add(name, verb)
        sub.add_argument(f"--{name.partition('-')[2]}", required=True, help=what)
        sub.add_argument("--out", required=True, help="the new folder")
        default = "bfloat16" if verb is export_ddpm else "float16"
        sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=default)
        if verb is export_ddpm:
            sub.add_argument("--max-shard-mb", type=_scale, default=16.0, help="no file of weights is larger")
            sub.add_argument("--name", help="title of the model card; default: the experiment's")

    sub = add("dataset", dataset, step=True)
    sub.add_argument("--out", required=True, help="data/<dataset>")
    sub.add_argument("--threads", type=_positive, help="CPU threads")
    sub = add("train-ddpm", train_ddpm, step=True, compute=True)
    sub.add_argument("--gpus", type=_count, help="GPUs that ddpm.num_processes may use; default: all that are visible")
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/ddpm")
    sub = add("train-classifier", train_classifier, step=True, compute=True)
    sub.add_argument("--role", choices=ROLES, help="which of the experiment's classifiers")
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--out", required=True, help="models/<experiment>/classifiers/<role>")
    sub = add("forward", forward, step=True, compute=True)
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--ddpm", required=True, help="models/<experiment>/ddpm")
    sub.add_argument("--classifiers", required=True, help="models/<experiment>/classifiers")
    sub.add_argument("--out", required=True, help="results/<experiment>/forward.csv")
    _add_sample_arguments(add("sample", sample, compute=True))
    sub = add("reference", reference, step=True, compute=True)
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--classifiers", required=True, help="models/<experiment>/classifiers")
    sub.add_argument("--cache", default=REFERENCE_CACHE, help=f"folder of the features; default {REFERENCE_CACHE}")
    sub.add_argument("--out", required=True, help="results/<experiment>/reference.json")
    _add_evaluate_arguments(add("evaluate", evaluate, compute=True))
    sub = add("tune", tune, compute=True)
    sub.add_argument("experiment", metavar="EXPERIMENT")
    sub.add_argument("--method", required=True, help="a key of methods")
    sub.add_argument("--budget", type=_positive, default=12, help="scales to measure at most; default 12")
    sub.add_argument("--num-samples", type=_positive, default=256, help="samples of each scale; default 256")
    sub.add_argument("--low", type=_scale, help="lowest scale; default: a tenth of the sweep's lowest, or 0.1")
    sub.add_argument("--high", type=_scale, help="highest scale; default: ten times the sweep's highest, or 1000")
    sub.add_argument("--config", default="config.yaml")
    sub.add_argument("--out", help="the block for config.yaml; default: results/EXPERIMENT/tune/<method>.yaml")
    sub = add("collect", collect)
    sub.add_argument("--metrics", nargs="+", required=True, help="results/<experiment>/metrics/*.csv")
    sub.add_argument("--out", required=True, help="results/<experiment>/metrics.csv")
    sub.add_argument("--best-by", choices=get_args(BestBy), default="cfid", help="rule for the best scale")
    sub.add_argument("--summary", help="results/<experiment>/summary.json")
    for name, verb in (("figures", figures), ("report", report)):
        sub = add(name, verb, step=True)
        sub.add_argument("--forward", required=True, help="results/<experiment>/forward.csv")
        sub.add_argument("--metrics", required=True, help="results/<experiment>/metrics.csv")
        sub.add_argument("--samples", required=True, help="results/<experiment>/samples")
        sub.add_argument("--out", required=True)
    sub.add_argument("--figures", required=True, help="results/<experiment>/figures")
    sub.add_argument("--models", required=True, help="models/<experiment>")
    sub.add_argument("--reference", help="results/<experiment>/reference.json")
    sub.add_argument("--comparison", help="results/<experiment>/paper_comparison.md")
    return parser


def _add_sample_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--ddpm", help="a diffusers folder or hub id")
    sub.add_argument(
        "--classifier",
        help="a saved classifier's folder, torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER or"
        " python:MODULE:FACTORY; without it nothing guides",
    )
    sub.add_argument("--scale", type=_scale, help="guidance scale s of eq. 1; default 1")
    sub.add_argument("--out", required=True, help="a folder; for a shard the .npy file")
    own = sub.add_argument_group("anybody's model")
    own.add_argument("--target", help="class by name or number")
    own.add_argument("--input", choices=("pred_x0", "x_t"), default="pred_x0", help="what the classifier sees")
    own.add_argument("--stabilizer", default="none", help="none, ema:BETA, adam, ...; betas per step; join by +")
    own.add_argument("--grad-mode", choices=("full", "checkpoint", "no_jacobian"), default="full")
    own.add_argument("--every-k", type=_positive, default=1, help="a new gradient each k-th step")
    own.add_argument(
        "--skip-above", type=float, default=1.0, metavar="P", help="no gradient for a sample while p(target) > P"
    )
    own.add_argument("--scale-schedule", default="constant", help="constant, linear:END, cosine:END, interval:LOW,HIGH")
    own.add_argument(
        "--no-clip-pred-x0", dest="clip_pred_x0", action="store_false", help="do not clip what the classifier sees"
    )
    own.add_argument("--trace", action="store_true", help="also record what the guidance did in each step")
    own.add_argument(
        "--sampler", choices=("model", "ddpm", "ddim", "dpmpp"), default="model", help="model: its own scheduler"
    )
    own.add_argument("--steps", type=_positive, help="sampling steps; default: all")
    own.add_argument("--eta", type=_scale, default=0.0, help="ddim: share of the ancestral noise, 0..1")
    own.add_argument("--num-samples", type=_positive, default=16)
    own.add_argument("--batch-size", type=_batch_size, default="auto", help="auto: as many as fit")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--start", choices=("auto", "standard_normal", "data_mean"), default="auto")
    own.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"))
    shard = sub.add_argument_group("a shard of an experiment")
    shard.add_argument("--config", help="config.yaml, or a step's settings file")
    shard.add_argument("--experiment", help="which experiment of config.yaml")
    shard.add_argument("--method", help="a key of methods")
    shard.add_argument("--shard", type=int, help="number of the shard, from 0")


def _add_evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--samples",
        required=True,
        help="a folder of images, .npy or .npz; of an experiment results/<experiment>/samples",
    )
    sub.add_argument(
        "--reference", required=True, help="real images likewise; of an experiment results/<experiment>/reference.json"
    )
    sub.add_argument("--out", help="a .json or .csv file; of an experiment results/<experiment>/metrics/<method>.csv")
    own = sub.add_argument_group("anybody's images")
    own.add_argument(
        "--features",
        nargs="+",
        default=["auto"],
        metavar="PROTOCOL",
        help="inception, torcheval, judge, SPEC of a network; auto: what is at hand; given: both sides hold features",
    )
    own.add_argument("--weights-dir", default="weights", help="folder of the Inception weights; default: weights")
    own.add_argument("--classifier", help="a judge for the accuracy, as for `nrcg sample`")
    own.add_argument("--target", help="class of the reference's labels and of the classifier")
    own.add_argument("--reference-labels", metavar="FILE", help=".npy or .csv; default: the names of the subfolders")
    own.add_argument("--num-samples", type=_positive, help="only the first samples")
    own.add_argument(
        "--num-pairwise", type=_count, default=10_000, help="images compared in pairs; 0: all; default: 10000"
    )
    own.add_argument("--image-size", type=_positive, help="resize all images to this many pixels squared first")
    own.add_argument("--batch-size", type=_batch_size, default="auto", help="auto: 64, fewer where memory runs out")
    own.add_argument("--seed", type=int, default=0, help="of the intervals' bootstrap")
    step = sub.add_argument_group("a method of an experiment")
    step.add_argument("--config", help="config.yaml, or a step's settings file")
    step.add_argument("--experiment", help="which experiment of config.yaml")
    step.add_argument("--method", help="a key of methods")
    step.add_argument("--scales", type=_scale, nargs="+", help="the method's scales")
    step.add_argument("--data", help="data/<dataset>")
    step.add_argument("--classifiers", help="models/<experiment>/classifiers")
    step.add_argument("--ddpm", help="models/<experiment>/ddpm: refuse samples of other weights")
    step.add_argument("--cache", default=REFERENCE_CACHE, help=f"folder of the features; default {REFERENCE_CACHE}")


def _device_flag(text: str) -> str:
    try:
        return checked_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return int(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value
