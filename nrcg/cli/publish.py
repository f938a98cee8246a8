"""The verb that makes a hub folder of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from nrcg.cli.arguments import Verbs, add_files, add_verb, choose_device, nonnegative, one_line, positive
from nrcg.cli.imports import lean_imports
from nrcg.config import WEIGHTS_TYPES


def add_publish(verbs: Verbs) -> None:
    sub = add_verb(verbs, "publish", publish, compute=True)
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="a diffusion model, such as models/EXPERIMENT/ddpm")
    add_files(sub, out="the hub's folder: weights, README.md, samples.png, pipeline.py")
    sub.add_argument("--name", required=True, metavar="USER/NAME", help="id on the hub, which the card's examples open")
    sub.add_argument("--license", default="mit", help="by the hub's name; default: %(default)s")
    sub.add_argument(
        "--classifier",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a saved classifier that goes with it, of which the first guides the samples; again",
    )
    sub.add_argument("--target", help="class of the guided samples; default: the first")
    sub.add_argument("--scale", type=nonnegative, default=5.0, help="of the guided samples; default: %(default)s")
    sub.add_argument("--metrics", type=Path, metavar="CSV", help="results/EXPERIMENT/metrics.csv, for the card's table")
    sub.add_argument("--num-samples", type=positive, default=16, help="in the picture; default: %(default)s")
    sub.add_argument("--steps", type=positive, help="sampling steps of the picture; default: all")
    sub.add_argument(
        "--unet-weights", choices=WEIGHTS_TYPES, help="type of the published weights; default: as they are"
    )
    sub.add_argument("--shard-size", default="4GB", help="largest file of weights; default: %(default)s")
    sub.add_argument(
        "--push", action="store_true", help="also upload it, with the token of HF_TOKEN or `hf auth login`"
    )
    sub.add_argument("--private", action="store_true", help="as a private model")


def publish(arguments: argparse.Namespace) -> None:
    """A model's folder for the Hugging Face hub, with card and samples."""
    with one_line(), lean_imports():
        from nrcg.steps import publish as step
    with one_line():
        device, _ = choose_device(arguments, None)
        what = step.Publication(
            ddpm=arguments.folder,
            name=arguments.name,
            license=arguments.license,
            classifiers=tuple(arguments.classifier),
            target=arguments.target,
            metrics=arguments.metrics,
            num_samples=arguments.num_samples,
            num_inference_steps=arguments.steps,
            scale=arguments.scale,
            shard_size=arguments.shard_size,
        )
        step.publish(what, out=arguments.out, device=device, dtype=arguments.unet_weights)
        print(f"{arguments.out}: weights, README.md, samples.png, pipeline.py")
        if arguments.push:
            print(step.push(arguments.out, arguments.name, private=arguments.private))
