"""The verb that explains a classifier's decisions by examples."""

from __future__ import annotations

import argparse
import sys

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_verb,
    choose_device,
    nonnegative,
    one_line,
    positive,
    positive_or_auto,
    positive_or_zero,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import COMPILE, GRAD_MODES, INPUTS, PRECISIONS, SAMPLERS, STARTS, WEIGHTS_TYPES
from nrcg.config.explaining import ATTACKS, DISTANCES, KINDS, PULLINGS, SEARCHES, settings_of

SETTINGS = (
    *("tau", "scale", "weight", "distance", "pull", "normalize", "stabilizer", "joint", "cone_angle", "input", "eta"),
    *("clip_pred_x0", "grad_mode", "every_k", "skip_above", "start", "search", "rounds", "confidence"),
    *("attack", "budget", "attack_step", "attack_steps", "seed"),
)
"""Flags that are settings of the same name; where one is not given the kind's default holds."""


def add_explain(verbs: Verbs) -> None:
    sub = add_verb(verbs, "explain", explain, compute=True)
    sub.add_argument("--ddpm", required=True, help="a diffusers folder or hub id of an unconditional DDPM")
    sub.add_argument("--classifier", required=True, help="the guide, as for `nrcg sample`")
    add_files(
        sub,
        images="a folder of images, .npy or .npz of uint8 images; resized to the model's size",
        out="a folder: explanations.html, .csv, .json, explanations/ and differences/ with a PNG each",
    )
    sub.add_argument("--kind", choices=KINDS, default="counterfactual", help="default: %(default)s")
    sub.add_argument("--target", help="class by name or number; default: the runner-up of each image")
    sub.add_argument(
        "--judge", action="append", default=[], metavar="SPEC", help="a classifier that only judges; again"
    )
    sub.add_argument("--robust", metavar="SPEC", help="project on the cone around this robust classifier's gradient")
    sub.add_argument("--labels", metavar="FILE", help="true classes of the images, as for `nrcg evaluate`")
    sub.add_argument("--num-images", type=positive, help="the first ones; default: all")
    sub.add_argument("--bits", action="store_true", help="also bits per dimension of the explanations")
    how = sub.add_argument_group("how they are made; default: what the kind sets")
    how.add_argument("--tau", type=float, help="share of the steps that the image is noised by, 0..1")
    how.add_argument("--scale", type=nonnegative, help="s of the classifier's gradient")
    how.add_argument("--weight", type=float, help="lambda of the distance; negative drives away")
    how.add_argument("--distance", choices=DISTANCES)
    how.add_argument("--pull", choices=PULLINGS, help="the distance as an implicit step, or by its gradient")
    how.add_argument("--normalize", action="store_true", default=None, help="gradients at norm one (DVCE)")
    how.add_argument("--stabilizer", help="as for `nrcg sample`, betas per step; default: ema:0.99 at 400 steps")
    how.add_argument("--joint", action="store_true", default=None, help="one stabilizer for the sum of both gradients")
    how.add_argument("--cone-angle", type=float, help="half-angle of the cone in degrees, 0..90; default 30")
    how.add_argument("--search", choices=SEARCHES, help="per image the least tau, or largest weight, that succeeds")
    how.add_argument("--rounds", type=positive, help="most trials of the search after the first")
    how.add_argument("--confidence", type=float, metavar="P", help="the search also wants p(class) >= P")
    how.add_argument("--input", choices=INPUTS, help="what the classifier sees")
    how.add_argument("--no-clip-pred-x0", dest="clip_pred_x0", action="store_false", default=None)
    how.add_argument("--grad-mode", choices=GRAD_MODES)
    how.add_argument("--every-k", type=positive, help="a new gradient each k-th step")
    how.add_argument("--skip-above", type=float, metavar="P", help="no classifier's gradient while p(target) > P")
    how.add_argument("--start", choices=("image", "auto", *STARTS), help="image: the noised image")
    how.add_argument("--attack", choices=ATTACKS, help="adversarial: sign or gradient steps")
    how.add_argument("--budget", type=float, help="adversarial: largest change, as a share of the pixels' range")
    how.add_argument("--attack-step", type=float, help="adversarial: size of a step, likewise")
    how.add_argument("--attack-steps", type=positive, help="adversarial: most steps")
    how.add_argument("--sampler", choices=SAMPLERS, default="model", help="model: its own scheduler")
    how.add_argument("--steps", type=positive, help="steps of a whole trajectory, of which tau takes the last")
    how.add_argument("--eta", type=nonnegative, help="ddim: share of the ancestral noise, 0..1")
    how.add_argument("--seed", type=positive_or_zero)
    how.add_argument("--batch-size", type=positive_or_auto, default="auto", help="auto: as many as fit")
    how.add_argument("--precision", choices=PRECISIONS)
    how.add_argument("--compile", choices=COMPILE, default="auto", help="auto: on a GPU, where it pays")
    how.add_argument("--unet-weights", choices=WEIGHTS_TYPES, help="type of the U-Net's weights, instead of autocast")


def explain(arguments: argparse.Namespace) -> None:
    """Counterfactual and other explanations of a classifier's decisions about images."""
    with one_line():
        given = {name: getattr(arguments, name) for name in SETTINGS}
        per_step = None if arguments.stabilizer is None else True
        settings = settings_of(arguments.kind, **given, num_inference_steps=arguments.steps, betas_per_step=per_step)
    with one_line(), lean_imports():
        from nrcg.guidance.pipeline import GuidedDDPMPipeline
        from nrcg.steps.explain import Explainers, explain_side
    from nrcg.classifiers.specs import load_classifier
    from nrcg.evaluation.features import extractor_name
    from nrcg.evaluation.sides import open_side

    with one_line():
        device, precision = choose_device(arguments, None)
        pipe = GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device).use_sampler(arguments.sampler)
        pipe.with_weights(arguments.unet_weights)
        _, height, width = pipe.image_shape()
        size = height if height == width else None
        images = open_side(arguments.images, labels=arguments.labels, image_size=size)
        names = ["judge"] if len(arguments.judge) == 1 else [extractor_name(spec) for spec in arguments.judge]
        robust = None if arguments.robust is None else load_classifier(arguments.robust).to(device)
        models = Explainers(
            load_classifier(arguments.classifier).to(device),
            robust,
            {name: load_classifier(spec).to(device) for name, spec in zip(names, arguments.judge, strict=True)},
        )
        found = explain_side(
            pipe,
            models,
            images,
            settings,
            out=arguments.out,
            target=arguments.target,
            num_images=arguments.num_images,
            batch_size=arguments.batch_size,
            precision=precision,
            compile=arguments.compile,
            bits=arguments.bits,
            record={name: getattr(arguments, name) for name in ("ddpm", "classifier", "robust", "judge", "sampler")},
        )
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    made = int((~found.explanations.skipped).sum())
    print(f"{int(found.explanations.succeeded.sum())} of {made} {arguments.kind} explanations succeeded")
    print(f"{arguments.out / 'explanations.html'}: pictures; explanations.csv: by image; explanations.json: metrics")
