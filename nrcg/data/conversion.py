"""From a listing of image files to the arrays of a data set: in parallel, and in pieces."""

from __future__ import annotations

import csv
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrcg.data.arrays import load_manifest
from nrcg.data.pixels import UnreadableImage, decode
from nrcg.data.sources import Encoded, Listing, check_counts
from nrcg.data.writing import GAP, new_dataset
from nrcg.errors import DataError
from nrcg.files import atomic_write_text
from nrcg.layout import SPLITS
from nrcg.processes import in_threads

PIECE_BYTES = 8_000_000
MORE_UNREADABLE = 100
"""So many unreadable files past the allowed ones are listed before the conversion gives up."""


@dataclass(frozen=True)
class _Piece:
    """Image files of a split from one on."""

    split: str
    start: int
    files: Sequence[Encoded]


@dataclass(frozen=True)
class _Decoded:
    """images (n, H, W, 3) uint8, zero where `reasons` (position in the piece -> words) has an entry; and the SHA-256 of
    every other file."""

    images: NDArray[np.uint8]
    reasons: dict[int, str]
    sha256: dict[int, bytes]


def convert(
    folder: Path | str,
    listing: Listing,
    *,
    name: str,
    classes: Sequence[str],
    image_size: int,
    preprocessing: str,
    max_unreadable: float,
    settings: Mapping[str, Any],
    workers: int | None = None,
    on_images: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Decode, resize and store the images of a listing as a data set.

    Unreadable files are left out and listed in <folder>/unreadable.csv. The arrays do not depend on the number of
    workers.

    Args:
        folder: Folder of the data set.
        listing: The images as they were found.
        name, classes: Of the data set, for the manifest.
        image_size, preprocessing: See `nrcg.data.pixels.decode`.
        max_unreadable: Largest share of the files that may be unreadable.
        settings: All that chose the images, for the manifest.
        workers: Threads; None is one per processor. Pillow decodes and resizes without Python's lock.
        on_images: Called with the number of images that are done, after every piece.

    Returns:
        The manifest.

    Raises:
        DataError: No image for a split or class; too many unreadable files; or another process is writing.
    """
    folder = Path(folder)
    labels = {split: listing.splits[split].labels for split in SPLITS}
    check_counts(listing.path, labels, classes)
    generation = dict(settings) | {"preprocessing": preprocessing, "resampling": "Pillow bilinear, antialiased"}
    with new_dataset(
        folder,
        name=name,
        source=listing.source,
        classes=classes,
        image_shape=(image_size, image_size, 3),
        num_images={split: len(labels[split]) for split in SPLITS},
        generation=generation,
    ) as writers:
        unreadable = _Unreadable(folder / "unreadable.csv", listing, max_unreadable)
        digests: dict[str, dict[int, bytes]] = {split: {} for split in SPLITS}
        done = 0

        def work(piece: _Piece) -> tuple[_Piece, _Decoded]:
            return piece, _decode_piece(piece.files, image_size, preprocessing)

        for piece, decoded in in_threads(work, _pieces(listing, max(1, PIECE_BYTES // (3 * image_size**2))), workers):
            part = slice(piece.start, piece.start + len(piece.files))
            known = labels[piece.split][part].copy()
            known[list(decoded.reasons)] = GAP
            unreadable.add(piece.split, piece.start, decoded.reasons)
            writers[piece.split].write_piece(listing.splits[piece.split].places[part], decoded.images, known)
            digests[piece.split] |= {piece.start + i: sha256 for i, sha256 in decoded.sha256.items()}
            done += len(piece.files)
            on_images(done)
        unreadable.check()
        # Files are hashed as they are read: the data set can be told from one made of other files.
        generation["images_sha256"] = _digest(digests)
        generation["copies"] = _count_copies(digests, labels)
        generation["unreadable"] = {"count": len(unreadable.rows), "files": [row[1] for row in unreadable.rows]}
        unreadable.write()
    return load_manifest(folder)


def _pieces(listing: Listing, size: int) -> Iterator[_Piece]:
    for split in SPLITS:
        images = listing.splits[split]
        for start in range(0, len(images.labels), size):
            yield _Piece(split, start, images.read(start, min(start + size, len(images.labels))))


def _decode_piece(files: Sequence[Encoded], image_size: int, preprocessing: str) -> _Decoded:
    images = np.zeros((len(files), image_size, image_size, 3), np.uint8)
    reasons, sha256 = {}, {}
    for i, file in enumerate(files):
        try:
            data = file.read_bytes()
            images[i] = decode(data, size=image_size, preprocessing=preprocessing)
            sha256[i] = hashlib.sha256(data).digest()
        except UnreadableImage as error:
            reasons[i] = str(error)
        except (OSError, EOFError, zlib.error, ValueError) as error:  # the disk's, or a damaged archive's
            reasons[i] = " ".join(str(error).split()) or type(error).__name__
    return _Decoded(images, reasons, sha256)


def _digest(digests: Mapping[str, Mapping[int, bytes]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for place in sorted(digests[split]):
            digest.update(digests[split][place])
    return digest.hexdigest()


def _count_copies(digests: Mapping[str, Mapping[int, bytes]], labels: Mapping[str, NDArray[np.int64]]) -> dict:
    """Files of equal bytes: validation images that are training images too, and images that stand in two classes."""
    known = set(digests["train"].values())
    classes: dict[bytes, set[int]] = {}
    for split, found in digests.items():
        for place, sha256 in found.items():
            classes.setdefault(sha256, set()).add(int(labels[split][place]))
    return {
        "val_in_train": sum(sha256 in known for sha256 in digests["val"].values()),
        "in_two_classes": sum(len(found) > 1 for found in classes.values()),
    }


class _Unreadable:
    """The files that could not be read so far, and whether they are too many."""

    def __init__(self, path: Path, listing: Listing, share: float) -> None:
        self.path, self.listing, self.share = path, listing, share
        self.total = sum(len(listing.splits[split].labels) for split in SPLITS)
        self.allowed = int(share * self.total + 1e-9)
        self.rows: list[tuple[str, str, str]] = []

    def add(self, split: str, start: int, reasons: Mapping[int, str]) -> None:
        for i, reason in reasons.items():
            name = self.listing.splits[split].name(start + i)
            self.rows.append((split, name.encode("utf-8", "backslashreplace").decode(), reason))
        if len(self.rows) > self.allowed + MORE_UNREADABLE:
            self.check("at least ")

    def check(self, about: str = "") -> None:
        """Raises DataError, and writes the list, where they are too many."""
        self.rows.sort()
        if len(self.rows) <= self.allowed:
            return
        self.write()
        _, name, reason = self.rows[0]
        raise DataError(
            f"{self.listing.path}: {about}{len(self.rows)} of {self.total:,} images cannot be read, more than"
            f" dataset.max_unreadable: {self.share:g} allows; such as {name} ({reason}); all are listed in {self.path}"
        )

    def write(self) -> None:
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("split", "file", "reason"), *self.rows])
        atomic_write_text(self.path, text.getvalue())
