"""What a reader of raw images hands to the conversion: the images of both splits, their labels and how to read them.

A reader (`nrcg.data.celeba`, `parquet`, `folders`, `digits`) looks at file names, lists and labels, and finds every
mistake in them, before the first image is decoded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nrcg.errors import DataError


class Encoded(Protocol):
    """An image file that is yet to be read; a `pathlib.Path` is one."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    """An image file that is in memory already."""

    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order in which they are read.

    Attributes:
        labels: (N,) int64, positions in the classes.
        places: (N,) int64, each image's position in the arrays: a permutation.
        name: of image i, for messages.
        read: the image files start .. stop - 1. Called for rising numbers; some may be left out.
    """

    labels: NDArray[np.int64]
    places: NDArray[np.int64]
    name: Callable[[int], str]
    read: Callable[[int, int], Sequence[Encoded]]


@dataclass(frozen=True)
class Listing:
    """Images as they were found.

    Attributes:
        path: where they were found, for messages.
        splits: "train" and "val".
        source: words for the manifest.
        files: what was found, one line each; changes when a raw file changes.
        notes: lines to tell the user.
    """

    path: Path
    splits: dict[str, Split]
    source: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def file_line(path: Path, name: str) -> str:
    """A line of `Listing.files`: the file's name, size and time of change."""
    try:
        found = path.stat()
    except OSError:  # such as a link to nowhere: unreadable, like a file that is cut off
        return f"{name} missing"
    return f"{name} {found.st_size} {found.st_mtime_ns}"


def file_split(paths: Sequence[Encoded], names: Sequence[str], labels: Sequence[int]) -> Split:
    """A split of files that can be read in any order, in the order in which they are given."""
    return Split(
        np.asarray(labels, np.int64), np.arange(len(labels)), lambda i: names[i], lambda start, stop: paths[start:stop]
    )


def mixed_order(names: Iterable[str], seed: int) -> NDArray[np.int64]:
    """Positions of the names in an order that depends on the names and the seed alone: by their SHA-256.

    The first n are then a fair choice, whatever order files have on disk, and an image that is added later moves
    none of the others past each other.
    """
    keys = [hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in names]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def split_off(labels: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which images validate: the first ones of each class, `share` of it rounded, but at least one and not all."""
    val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        val[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return val


def check_counts(where: str | os.PathLike, labels: dict[str, NDArray[np.int64]], classes: Sequence[str]) -> None:
    """Raises DataError where a split is empty or a class has no training image."""
    for split, found in labels.items():
        if not len(found):
            raise DataError(f"{where}: no image for the split {split}")
    missing = np.flatnonzero(np.bincount(labels["train"], minlength=len(classes)) == 0)
    if len(missing):
        names = ", ".join(repr(classes[label]) for label in missing)
        raise DataError(f"{where}: no training image of the class {names} among {len(labels['train']):,}")
