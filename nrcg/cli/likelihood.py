"""The verb that measures likelihood."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nrcg.cli.arguments import (
    Verbs,
    add_files,
    add_verb,
    choose_device,
    one_line,
    positive,
    positive_or_auto,
    positive_or_zero,
    run_step,
)
from nrcg.cli.imports import lean_imports
from nrcg.config import PRECISIONS
from nrcg.errors import ConfigError

DEFAULT_STEPS, DEFAULT_IMAGES = 20, 1024


def add_likelihood(verbs: Verbs) -> None:
    sub = add_verb(verbs, "likelihood", likelihood, compute=True)
    sub.add_argument("--ddpm", required=True, help="a diffusers folder or hub id of an unconditional DDPM")
    add_files(
        sub,
        data="a folder of images, .npy or .npz of uint8 images, such as data/<name>/val/images.npy; of a shard the data"
        " set's folder",
        out="a folder: likelihood.json, likelihood.csv (by t), images.csv; for a shard the .npz file",
    )
    shard = sub.add_argument_group("a shard of an experiment")
    shard.add_argument("--config", help="config.yaml, or a step's settings file")
    shard.add_argument("--experiment", help="which experiment of config.yaml")
    shard.add_argument("--shard", type=int, help="number of the shard, from 0")
    own = sub.add_argument_group("anybody's model")
    own.add_argument("--num-images", type=positive, default=DEFAULT_IMAGES, help="the first ones; default: %(default)s")
    own.add_argument(
        "--num-steps",
        type=positive_or_zero,
        default=DEFAULT_STEPS,
        help="terms of the bound per image, a stratified choice; 0: all T; default: %(default)s",
    )
    own.add_argument(
        "--flow", type=positive_or_zero, default=0, metavar="SIGNS", help="also by the flow, with so many random signs"
    )
    own.add_argument("--image-size", type=positive, help="resize all images to this many pixels squared first")
    own.add_argument("--batch-size", type=positive_or_auto, default="auto", help="auto: as many as fit")
    own.add_argument("--seed", type=positive_or_zero, default=0)
    own.add_argument("--precision", choices=PRECISIONS)


def likelihood(arguments: argparse.Namespace) -> None:
    """Bits per dimension of images: of anybody's model, or a shard of the pipeline."""
    if arguments.config is not None:
        if arguments.shard is None:
            raise ConfigError("--shard: missing; with --config a shard is measured")
        run_step(arguments, "likelihood.measure_shard", "likelihood")
        return
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
    try:
        from nrcg.report.likelihood import save_likelihood_figure
    except ImportError as error:
        print(f"nrcg: bits_per_dim.png needs {error.name}: pip install 'nrcg[pipeline]'", file=sys.stderr)
    else:
        save_likelihood_figure(arguments.out)


def add_likelihood_table(verbs: Verbs) -> None:
    sub = add_verb(verbs, "likelihood-table", likelihood_table, step=True)
    sub.add_argument("--shards", type=Path, nargs="+", required=True, help="results/<experiment>/likelihood/*.npz")
    add_files(sub, out="results/<experiment>/likelihood")


def likelihood_table(arguments: argparse.Namespace) -> None:
    """Join the shards of an experiment's likelihood: tables and figure."""
    run_step(arguments, "likelihood_table.join_likelihood", "likelihood", compute=False)
