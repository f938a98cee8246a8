"""Verbs that bring data and models in: data sets, the paper's released files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nrcg.cli.arguments import Verbs, add_verb, positive, read_settings
from nrcg.errors import DataError
from nrcg.steps.common import log_dataset

if TYPE_CHECKING:
    from nrcg.config import ImageData, SportBallsData
    from nrcg.data.sources import Listing


def add_dataset(verbs: Verbs) -> None:
    sub = add_verb(verbs, "dataset", dataset, step=True)
    sub.add_argument("--out", required=True, help="data/<dataset>")
    sub.add_argument("--threads", type=positive, help="CPU threads")


def dataset(arguments: argparse.Namespace) -> None:
    """Make a data set: draw it, or read, check and convert raw images."""
    from nrcg import tracking
    from nrcg.data.arrays import load_manifest

    settings = read_settings(arguments, "dataset")
    name = f"dataset {settings.dataset.name}"
    with tracking.run(settings.experiment, name, kind="dataset", params=settings.model_dump(), deferred=True) as run:
        if settings.dataset.source == "sportballs":
            _draw_dataset(arguments, settings.dataset)
        else:
            _convert_dataset(arguments, settings.dataset)
        manifest = load_manifest(arguments.out)
        for split in manifest["splits"]:
            log_dataset(run, manifest, arguments.out, split, "made")


def _draw_dataset(arguments: argparse.Namespace, data: SportBallsData) -> None:
    from nrcg.data.sportballs import write_sportballs
    from nrcg.pipeline.progress import Progress

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
    from nrcg.data.conversion import convert
    from nrcg.pipeline.progress import Progress

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
    from nrcg.data.celeba import list_celeba
    from nrcg.data.folders import list_folders, list_labelled
    from nrcg.data.parquet import list_parquet

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
