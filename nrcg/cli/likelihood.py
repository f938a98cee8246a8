"""The verb that measures likelihood."""

from __future__ import annotations

import argparse

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_verb,
    choose_device,
    one_line,
    positive,
    positive_or_auto,
    positive_or_zero,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import PRECISIONS

DEFAULT_STEPS, DEFAULT_IMAGES = 20, 1024


def add_likelihood(verbs: Verbs) -> None:
    sub = add_verb(verbs, "likelihood", likelihood, compute=True)
    sub.add_argument("--ddpm", required=True, help="a diffusers folder or hub id of an unconditional DDPM")
    add_files(
        sub,
        data="a folder of images, .npy or .npz of uint8 images, such as data/<name>/val/images.npy",
        out="a folder: likelihood.json, likelihood.csv (by t), images.csv",
    )
    sub.add_argument("--num-images", type=positive, default=DEFAULT_IMAGES, help="the first ones; default: %(default)s")
    sub.add_argument(
        "--num-steps",
        type=positive_or_zero,
        default=DEFAULT_STEPS,
        help="terms of the bound per image, a stratified choice; 0: all T; default: %(default)s",
    )
    sub.add_argument(
        "--flow", type=positive_or_zero, default=0, metavar="SIGNS", help="also by the flow, with so many random signs"
    )
    sub.add_argument("--image-size", type=positive, help="resize all images to this many pixels squared first")
    sub.add_argument("--batch-size", type=positive_or_auto, default="auto", help="auto: as many as fit")
    sub.add_argument("--seed", type=positive_or_zero, default=0)
    sub.add_argument("--precision", choices=PRECISIONS)


def likelihood(arguments: argparse.Namespace) -> None:
    """Bits per dimension of images under anybody's diffusion model."""
    with one_line(), lean_imports():
        from nrcg.guidance.pipeline import GuidedDDPMPipeline
        from nrcg.steps.likelihood import Measure, measure_likelihood
    from nrcg.evaluation.sides import open_side
    from nrcg.files import weights_sha256

    with one_line():
        images = open_side(arguments.data, image_size=arguments.image_size)
        device, precision = choose_device(arguments, None)
        pipe = GuidedDDPMPipeline.from_pretrained(arguments.ddpm).to(device)
        how = Measure(
            num_images=min(arguments.num_images, images.count),
            num_steps=arguments.num_steps or None,
            num_traces=arguments.flow,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            precision=precision,
        )
        identity = f"{arguments.ddpm} {weights_sha256(arguments.ddpm)} {arguments.data} {arguments.image_size}"
        record = measure_likelihood(pipe, images, how, out=arguments.out, identity=identity)
    for name, words in (("bits_per_dim", "bound"), ("flow_bits_per_dim", "flow")):
        if name in record:
            value, error = record[name]
            print(f"{words}: {value:.4f} +- {error:.4f} bits/dim (standard error over {record['num_images']:,} images)")
    print(f"{arguments.out / 'likelihood.csv'}: by t; {arguments.out / 'images.csv'}: by image")
