"""The verb that samples: a shard of the pipeline, or anybody's model."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_method,
    add_verb,
    choose_device,
    nonnegative,
    one_line,
    positive,
    positive_or_auto,
    run_step,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import COMPILE, GRAD_MODES, INPUTS, PRECISIONS, SAMPLERS, STARTS, WEIGHTS_TYPES, MethodConfig
from nrcg.errors import ConfigError
from nrcg.files import may_be_hub_id

if TYPE_CHECKING:
    from nrcg.guidance.guidance import ClassifierGuidance

CONDITIONS = ("prompt", "negative_prompt", "guidance_scale")
"""Flags for models of text."""


def add_sample(verbs: Verbs) -> None:
    sub = add_verb(verbs, "sample", sample, compute=True)
    sub.add_argument("--ddpm", help="a diffusers folder or hub id")
    sub.add_argument(
        "--classifier",
        help="a saved classifier's folder, torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER,"
        " clip:ID_OR_FOLDER?texts=A|B or python:MODULE:FACTORY; without it nothing guides",
    )
    sub.add_argument("--scale", type=nonnegative, help="guidance scale s of eq. 1; default 1")
    add_files(sub, out="a folder; for a shard the .npy file")
    own = sub.add_argument_group("anybody's model")
    own.add_argument(
        "--target",
        help="class by name or number; any of several, A|B; a probability, CLASS=0.5; a regression's value, value=V; a"
        " score, score",
    )
    own.add_argument("--prompt", help="for a model of text, such as Stable Diffusion; default: none")
    own.add_argument("--negative-prompt", help="what the images are to be unlike")
    own.add_argument("--guidance-scale", type=nonnegative, help="of the prompt's own guidance; default 7.5")
    own.add_argument("--input", choices=INPUTS, default="pred_x0", help="what the classifier sees")
    own.add_argument("--stabilizer", default="none", help="none, ema:BETA, adam, ...; betas per step; join by +")
    own.add_argument("--grad-mode", choices=GRAD_MODES, default="full")
    own.add_argument("--every-k", type=positive, default=1, help="a new gradient each k-th step")
    own.add_argument(
        "--skip-above", type=float, default=1.0, metavar="P", help="no gradient for a sample while p(target) > P"
    )
    own.add_argument(
        "--scale-schedule",
        default="constant",
        help="constant, linear:END, cosine:END, interval:LOW,HIGH, snr:GAMMA, forward:CSV,METHOD",
    )
    own.add_argument(
        "--no-clip-pred-x0", dest="clip_pred_x0", action="store_false", help="do not clip what the classifier sees"
    )
    own.add_argument("--trace", action="store_true", help="also record what the guidance did in each step")
    own.add_argument("--sampler", choices=SAMPLERS, default="model", help="model: its own scheduler")
    own.add_argument("--steps", type=positive, help="sampling steps; default: all, with a prompt 50")
    own.add_argument("--eta", type=nonnegative, default=0.0, help="ddim: share of the ancestral noise, 0..1")
    own.add_argument("--num-samples", type=positive, default=16)
    own.add_argument("--batch-size", type=positive_or_auto, default="auto", help="auto: as many as fit")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--start", choices=("auto", *STARTS), default="auto")
    own.add_argument("--precision", choices=PRECISIONS)
    own.add_argument("--compile", choices=COMPILE, default="auto", help="auto: on a GPU, where it pays")
    own.add_argument("--unet-weights", choices=WEIGHTS_TYPES, help="type of the U-Net's weights, instead of autocast")
    shard = sub.add_argument_group("a shard of an experiment")
    add_method(shard)
    shard.add_argument("--shard", type=int, help="number of the shard, from 0")


def sample(arguments: argparse.Namespace) -> None:
    """Guided sampling: a shard of the pipeline, or anybody's model and classifier."""
    with one_line():
        if arguments.config is None:
            _sample_images(arguments)
        else:
            _sample_shard(arguments)


def _sample_shard(arguments: argparse.Namespace) -> None:
    for flag in ("method", "scale", "shard", "ddpm"):
        if getattr(arguments, flag) is None:
            raise ConfigError(f"--{flag}: missing; with --config a shard needs --method, --scale, --shard and --ddpm")
    run_step(arguments, "sample.sample_shard", "sample", arguments.method)


def _sample_images(arguments: argparse.Namespace) -> None:
    if arguments.ddpm is None:
        raise ConfigError("--ddpm: missing; give a diffusers folder or hub id")
    with nullcontext() if _may_read_text(arguments.ddpm) else lean_imports():
        from nrcg.guidance.opening import load_pipeline
        from nrcg.steps.sample import Drawing, sample_images

    guidance = _guidance(arguments)
    if arguments.trace and guidance is None:
        raise ConfigError("--trace: nothing guides; give --classifier")
    device, precision = choose_device(arguments, None)
    pipe = load_pipeline(arguments.ddpm).to(device).use_sampler(arguments.sampler)
    pipe.with_weights(arguments.unet_weights)
    conditions = {name: getattr(arguments, name) for name in CONDITIONS if getattr(arguments, name) is not None}
    if conditions and not pipe.takes_prompt:
        flag = next(iter(conditions)).replace("_", "-")
        raise ConfigError(f"--{flag}: {arguments.ddpm} is a model without text; leave it out")
    same = {
        name: getattr(arguments, name)
        for name in ("num_samples", "batch_size", "seed", "start", "eta", "compile", "trace")
    }
    drawing = Drawing(
        precision=precision, num_inference_steps=arguments.steps or pipe.default_steps, conditions=conditions, **same
    )
    # What was asked for, as the flags name it.
    asked = (
        *("ddpm", "classifier", "target", "scale", "scale_schedule", "input", "stabilizer", "grad_mode", "every_k"),
        *("skip_above", "clip_pred_x0", "sampler", "eta", *CONDITIONS),
    )
    record = {name: getattr(arguments, name) for name in asked}
    drawn = sample_images(pipe, guidance, drawing, out=arguments.out, record=record)
    traced = ""
    if drawn.trace is not None:
        traced = ", samples.trace.npz"
        try:
            from nrcg.report.trace_figure import save_trace_figure
        except ImportError as error:
            print(f"nrcg: trace.png needs {error.name}: pip install 'nrcg[pipeline]'", file=sys.stderr)
        else:
            save_trace_figure(arguments.out / "trace.png", drawn.trace)
            traced += ", trace.png"
    print(f"{len(drawn.images)} samples in {arguments.out}: samples.npy, grid.png{traced}, {0:05d}.png ...")


def _may_read_text(model: str) -> bool:
    """Whether a model may have a text encoder, which needs transformers: one of the hub, and a folder that says so."""
    index = Path(model) / "model_index.json"
    if not Path(model).exists():
        return may_be_hub_id(model)
    return index.is_file() and "text_encoder" in index.read_text(errors="replace")


def _guidance(arguments: argparse.Namespace) -> ClassifierGuidance | None:
    """Guidance as the flags ask for it."""
    from nrcg.classifiers.specs import load_classifier
    from nrcg.guidance import scales, stabilizers, targets
    from nrcg.guidance.building import build_guidance

    parsed = {}
    for name, parse in (("stabilizer", stabilizers.parse), ("scale_schedule", scales.parse)):
        try:
            parsed[name] = parse(getattr(arguments, name))
        except ValueError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None
    if arguments.classifier is None:
        return None
    classifier = load_classifier(arguments.classifier, logits=targets.needs_logits(arguments.target or ""))
    if arguments.target is None:
        names = f"{', '.join(classifier.classes[:20])} or a number" if classifier.classes else "a number"
        raise ConfigError(f"--target: missing; allowed: {names}")
    try:
        target = targets.parse(arguments.target, classifier.classes)
    except ValueError as error:
        raise ConfigError(str(error).replace("target: ", "--target: ", 1)) from None
    flags = {name: getattr(arguments, name) for name in ("input", "grad_mode", "every_k", "skip_above")}
    method = MethodConfig.model_construct(**flags, **parsed)
    scale = 1.0 if arguments.scale is None else arguments.scale
    return build_guidance(method, classifier, target, scale, clip_pred_x0=arguments.clip_pred_x0)
