"""Making a data set: drawn, or read from raw images, checked and converted."""

from __future__ import annotations

import sys
from pathlib import Path

from nrcg import tracking
from nrcg.config import DatasetStep, DigitsData, ImageData, SportBallsData
from nrcg.data.celeba import list_celeba
from nrcg.data.conversion import convert
from nrcg.data.digits import list_digits
from nrcg.data.folders import list_folders, list_labelled
from nrcg.data.parquet import list_parquet
from nrcg.data.sources import Listing
from nrcg.data.sportballs import write_sportballs
from nrcg.errors import DataError
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import log_dataset


def make_dataset(settings: DatasetStep, *, out: Path, threads: int | None = None) -> dict:
    """Write a data set.

    Args:
        settings: Which images, and how they are made or read.
        out: Folder of the data set.
        threads: Threads; None: one for each processor.

    Returns:
        The manifest.

    Raises:
        DataError: Raw images are missing, damaged or not what the settings say.
    """
    data = settings.dataset
    name = f"dataset {data.name}"
    with tracking.run(settings.experiment, name, kind="dataset", params=settings.model_dump(), deferred=True) as run:
        manifest = (_draw if data.source == "sportballs" else _convert)(data, out, threads)
        for split in manifest["splits"]:
            log_dataset(run, manifest, out, split, "made")
    return manifest


def _draw(data: SportBallsData, out: Path, workers: int | None) -> dict:
    with Progress(f"dataset {data.name}", data.num_train + data.num_val, "image") as bar:
        return write_sportballs(
            out,
            image_size=data.image_size,
            classes=data.classes,
            num_train=data.num_train,
            num_val=data.num_val,
            diameter=tuple(data.diameter),
            seed=data.seed,
            name=data.name,
            workers=workers,
            progress=lambda done, _: bar.set(done),
        )


def _convert(data: DigitsData | ImageData, out: Path, workers: int | None) -> dict:
    try:
        listing = _list_images(data)
    except OSError as error:  # a folder that may not be read
        raise DataError(f"{data.path}: {error}") from error
    for note in listing.notes:
        print(f"{data.path}: {note}", file=sys.stderr, flush=True)
    total = sum(len(split.labels) for split in listing.splits.values())
    with Progress(f"dataset {data.name}", total, "image") as bar:
        manifest = convert(
            out,
            listing,
            name=data.name,
            classes=data.classes,
            image_size=data.image_size,
            preprocessing=data.preprocessing,
            max_unreadable=data.max_unreadable,
            settings=data.model_dump(exclude={"name", "classes", "image_size", "preprocessing", "download"}),
            workers=workers,
            on_images=bar.set,
        )
    for split, entry in manifest["splits"].items():
        counts = ", ".join(f"{name} {count:,}" for name, count in entry["class_counts"].items())
        print(f"{split}: {entry['num_images']:,} images: {counts}")
    if count := manifest["generation"]["unreadable"]["count"]:
        print(f"{count:,} unreadable files were left out: {out / 'unreadable.csv'}")
    copies = manifest["generation"]["copies"]
    if count := copies["val_in_train"]:
        print(f"{count:,} validation images are training images too (files of equal bytes)")
    if count := copies["in_two_classes"]:
        print(f"{count:,} images stand in more than one class (files of equal bytes)")
    return manifest


def _list_images(data: DigitsData | ImageData) -> Listing:
    """The raw images that the configuration names."""
    if data.source == "digits":
        return list_digits(val_share=data.val_share, seed=data.seed)
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
