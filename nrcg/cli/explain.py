"""The verb that explains a classifier's decisions by examples."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_verb,
    choose_device,
    fraction,
    nonnegative,
    one_line,
    positive,
    positive_or_auto,
    positive_or_zero,
    print_table,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import COMPILE, GRAD_MODES, INPUTS, PRECISIONS, SAMPLERS, STARTS, WEIGHTS_TYPES
from nrcg.config.explaining import ATTACKS, DISTANCES, KINDS, PULLINGS, SEARCHES, settings_of
from nrcg.errors import ConfigError

if TYPE_CHECKING:
    from nrcg.steps.explain import Measures

SETTINGS = (
    *("tau", "scale", "weight", "distance", "pull", "normalize", "stabilizer", "joint", "cone_angle", "input", "eta"),
    *("clip_pred_x0", "grad_mode", "every_k", "skip_above", "start", "search", "rounds", "confidence"),
    *("attack", "budget", "attack_step", "attack_steps", "seed"),
)
"""Flags that are settings of the same name; where one is not given the kind's default holds."""
RECORDED = ("ddpm", "classifier", "robust", "judge", "sampler", "reference", "identity")
"""Flags that explanations.json says as they were given."""


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
    _add_measures(sub)
    _add_settings(sub)


def _add_measures(sub: argparse.ArgumentParser) -> None:
    """What is measured beside what the models say."""
    what = sub.add_argument_group("what is measured")
    what.add_argument("--num-seeds", type=positive, default=1, help="explanations of each image; default: 1")
    what.add_argument(
        "--noise",
        type=fraction,
        default=0.0,
        metavar="S",
        help="also explain the images with Gaussian noise of this deviation, as a share of the range: 0.02",
    )
    what.add_argument("--bits", action="store_true", help="also bits per dimension of the explanations")
    what.add_argument(
        "--reference", metavar="PATH", help="real images, a folder, .npy or .npz: Fréchet and other distances to them"
    )
    what.add_argument(
        "--reference-labels", metavar="FILE", help=".npy or .csv; with --target the distance to images of that class"
    )
    what.add_argument("--resize-reference", action="store_true", help="resize the real images to the model's size")
    what.add_argument(
        "--features", nargs="+", metavar="PROTOCOL", help="of these distances, as of `nrcg evaluate`; default: auto"
    )
    what.add_argument("--weights-dir", default="weights", help="folder of the Inception weights; default: weights")
    what.add_argument("--num-pairwise", type=positive_or_zero, help="images compared in pairs; 0: all; default: 10000")
    what.add_argument(
        "--identity",
        action="append",
        default=[],
        metavar="PROTOCOL",
        help="features that say whose picture it is, as --features, such as the SPEC of a face network; again",
    )
    what.add_argument(
        "--identity-threshold", type=fraction, metavar="C", help="cosine above which two show the same; default: 0.5"
    )


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """The knobs of the engine."""
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
    _check_reference_flags(arguments)
    with one_line():
        given = {name: getattr(arguments, name) for name in SETTINGS}
        per_step = None if arguments.stabilizer is None else True
        settings = settings_of(arguments.kind, **given, num_inference_steps=arguments.steps, betas_per_step=per_step)
    with one_line(), lean_imports():
        from nrcg.guidance.pipeline import GuidedDDPMPipeline
        from nrcg.steps.explain import Explainers, explain_side
        from nrcg.steps.explain_files import summary
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
        measures = _measures(arguments, size)
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
            measures=measures,
            batch_size=arguments.batch_size,
            precision=precision,
            compile=arguments.compile,
            record={name: getattr(arguments, name) for name in RECORDED},
        )
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    made = int((~found.explanations.skipped).sum())
    print(f"{int(found.explanations.succeeded.sum())} of {made} {arguments.kind} explanations succeeded")
    if found.metrics is not None:
        print_table([("metric", "value", "95 % interval"), *summary(found.metrics)])
        if found.metrics["missing"]:
            print(f"not measured: {found.metrics['missing']}")
    print(f"{arguments.out / 'explanations.html'}: pictures; explanations.csv: by image; explanations.json: metrics")


def _check_reference_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that says something about real images where there are none."""
    if arguments.reference is not None:
        return
    for flag in ("reference_labels", "resize_reference", "features", "num_pairwise"):
        if getattr(arguments, flag) not in (None, False):
            raise ConfigError(f"--{flag.replace('_', '-')}: says how real images are compared; give --reference")


def _measures(arguments: argparse.Namespace, size: int | None) -> Measures:
    """What is measured.

    Args:
        size: Side of the model's square images; None where they are no square.
    """
    from nrcg.evaluation.sides import open_side
    from nrcg.explain.metrics import VERIFIED
    from nrcg.steps.explain import Measures
    from nrcg.steps.explain_reference import RealImages

    real = None
    if arguments.reference is not None:
        resized = size if arguments.resize_reference else None
        side = open_side(arguments.reference, labels=arguments.reference_labels, image_size=resized)
        pairwise = 10_000 if arguments.num_pairwise is None else arguments.num_pairwise or None
        real = RealImages(side, arguments.features or ["auto"], arguments.weights_dir, pairwise)
    threshold = VERIFIED if arguments.identity_threshold is None else arguments.identity_threshold
    return Measures(
        num_seeds=arguments.num_seeds,
        noise=arguments.noise,
        bits=arguments.bits,
        real=real,
        identities=arguments.identity,
        identity_threshold=threshold,
        weights_dir=arguments.weights_dir,
    )
