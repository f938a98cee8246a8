"""Verbs that run the models: guided sampling, and the forward analysis."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nrcg.cli.arguments import (
    Verbs,
    add_verb,
    choose_device,
    nonnegative,
    open_pipeline,
    positive,
    positive_or_auto,
    read_settings,
)
from nrcg.config import SampleStep
from nrcg.errors import ConfigError
from nrcg.layout import format_scale
from nrcg.steps.common import checked_data, log_dataset
from nrcg.steps.sample import draw_samples, method_guidance

GRID_SAMPLES = 256
"""Samples in grid.png of `nrcg sample`, as many as the paper's fig. 9 shows."""


def add_sample(verbs: Verbs) -> None:
    sub = add_verb(verbs, "sample", sample, compute=True)
    sub.add_argument("--ddpm", help="a diffusers folder or hub id")
    sub.add_argument(
        "--classifier",
        help="a saved classifier's folder, torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER or"
        " python:MODULE:FACTORY; without it nothing guides",
    )
    sub.add_argument("--scale", type=nonnegative, help="guidance scale s of eq. 1; default 1")
    sub.add_argument("--out", required=True, help="a folder; for a shard the .npy file")
    own = sub.add_argument_group("anybody's model")
    own.add_argument("--target", help="class by name or number")
    own.add_argument("--input", choices=("pred_x0", "x_t"), default="pred_x0", help="what the classifier sees")
    own.add_argument("--stabilizer", default="none", help="none, ema:BETA, adam, ...; betas per step; join by +")
    own.add_argument("--grad-mode", choices=("full", "checkpoint", "no_jacobian"), default="full")
    own.add_argument("--every-k", type=positive, default=1, help="a new gradient each k-th step")
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
    own.add_argument("--steps", type=positive, help="sampling steps; default: all")
    own.add_argument("--eta", type=nonnegative, default=0.0, help="ddim: share of the ancestral noise, 0..1")
    own.add_argument("--num-samples", type=positive, default=16)
    own.add_argument("--batch-size", type=positive_or_auto, default="auto", help="auto: as many as fit")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--start", choices=("auto", "standard_normal", "data_mean"), default="auto")
    own.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"))
    shard = sub.add_argument_group("a shard of an experiment")
    shard.add_argument("--config", help="config.yaml, or a step's settings file")
    shard.add_argument("--experiment", help="which experiment of config.yaml")
    shard.add_argument("--method", help="a key of methods")
    shard.add_argument("--shard", type=int, help="number of the shard, from 0")


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
    from nrcg.classifiers.storage import open_classifier
    from nrcg.files import weights_sha256

    for flag in ("method", "scale", "shard"):
        if getattr(arguments, flag) is None:
            raise ConfigError(f"--{flag}: missing; with --config a shard needs --method, --scale and --shard")
    settings: SampleStep = read_settings(arguments, "sample", arguments.method)
    method, config = settings.guidance, settings.sampling
    first = arguments.shard * config.shard_size
    count = min(config.shard_size, config.num_samples - first)
    if count < 1:
        raise ConfigError(f"--shard: {arguments.shard} is past the last of {config.num_samples} samples")
    pipe, device, precision = open_pipeline(arguments, settings)
    pipe.use_sampler(method.sampler.name)
    guidance, weights = None, {"ddpm": weights_sha256(arguments.ddpm)}
    if method.classifier is not None:
        if arguments.classifier is None:
            raise ConfigError(f"--classifier: missing; method {settings.method} is guided by {method.classifier}")
        guidance = method_guidance(settings, open_classifier(arguments.classifier), arguments.scale, pipe)
        weights["classifier"] = weights_sha256(arguments.classifier)
    label = f"sample {settings.method} scale {format_scale(arguments.scale)}"
    with tracking.run(
        settings.experiment,
        f"{label} shard {arguments.shard}",
        kind="shard",
        params=settings.model_dump() | {"scale": arguments.scale, "shard": arguments.shard, "weights_sha256": weights},
        tags={"method": settings.method},
        deferred=True,
    ) as run:
        draw_samples(
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


def _sample_own(arguments: argparse.Namespace) -> None:
    """`nrcg sample --ddpm ... --classifier ... --out DIR`: PNGs, samples.npy and a grid."""
    from PIL import Image

    from nrcg.data.pictures import sample_grid, save_png
    from nrcg.guidance.trace import Trace
    from nrcg.report.figures import save_trace_figure

    if arguments.ddpm is None:
        raise ConfigError("--ddpm: missing; give a diffusers folder or hub id")
    guidance = _own_guidance(arguments)
    if arguments.trace and guidance is None:
        raise ConfigError("--trace: nothing guides; give --classifier")
    pipe, device, precision = open_pipeline(arguments, None)
    pipe.use_sampler(arguments.sampler)
    out = Path(arguments.out)
    # What was asked for, as the flags name it.
    asked = (
        *("ddpm", "classifier", "target", "scale", "scale_schedule", "input", "stabilizer", "grad_mode", "every_k"),
        *("skip_above", "clip_pred_x0", "sampler", "eta"),
    )
    images = draw_samples(
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
    from nrcg.classifiers.logits import class_index
    from nrcg.classifiers.specs import load_classifier
    from nrcg.guidance import scales, stabilizers
    from nrcg.guidance.guidance import ClassifierGuidance

    try:
        stabilizer = stabilizers.parse(arguments.stabilizer)
    except ValueError as error:
        raise ConfigError(f"--stabilizer: {error}") from None
    try:
        scale = scales.parse(arguments.scale_schedule, 1.0 if arguments.scale is None else arguments.scale)
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


def add_forward(verbs: Verbs) -> None:
    sub = add_verb(verbs, "forward", forward, step=True, compute=True)
    sub.add_argument("--data", required=True, help="data/<dataset>")
    sub.add_argument("--ddpm", required=True, help="models/<experiment>/ddpm")
    sub.add_argument("--classifiers", required=True, help="models/<experiment>/classifiers")
    sub.add_argument("--out", required=True, help="results/<experiment>/forward.csv")


def forward(arguments: argparse.Namespace) -> None:
    """Forward analysis: figs. 1 to 4."""
    import torch

    from nrcg import tracking
    from nrcg.classifiers.logits import class_index
    from nrcg.classifiers.storage import open_classifier
    from nrcg.config import stabilizer_name
    from nrcg.csv_files import write_csv
    from nrcg.data.arrays import load_manifest, open_split, to_unit
    from nrcg.guidance import stabilizers
    from nrcg.guidance.pipeline import GuidedDDPMPipeline
    from nrcg.guidance.sensitivity import forward_analysis
    from nrcg.pipeline.progress import Progress
    from nrcg.report.columns import FORWARD_COLUMNS

    settings = read_settings(arguments, "forward")
    config = settings.forward
    device, precision = choose_device(arguments, settings)
    pipe = GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device)
    schedule = pipe.schedule()
    models = {role: open_classifier(Path(arguments.classifiers) / role) for role in ("robust", "non_robust")}
    checked_data(arguments.data)
    images, labels = open_split(arguments.data, "val")
    count = min(config.num_images, len(images))
    smoothing = {
        stabilizer_name(entry): stabilizers.from_config(entry, schedule.num_steps) for entry in config.stabilizers
    }
    with (
        tracking.run(settings.experiment, "forward", kind="forward", params=settings.model_dump()) as run,
        Progress("forward", count * (schedule.num_steps + 1), "step") as bar,
    ):
        log_dataset(run, load_manifest(arguments.data), arguments.data, "val", "forward analysis")
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
