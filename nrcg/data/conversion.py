"""From a listing of image files to the arrays of `nrcg.datasets`: parallel, in pieces, and taken up after a kill.

Pieces that are done stand in a journal beside the arrays, with a checksum of what was written. A run that is stopped
leaves journal and unfinished arrays under names that end in .partial; the next run of the same conversion checks and
keeps what is there. A journal of other settings, or of raw files that have changed since, counts for nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nrcg.data.arrays import SPLITS, load_manifest
from nrcg.data.pixels import UnreadableImage, decode
from nrcg.data.sources import Encoded, Listing, Split, check_counts
from nrcg.data.writing import SplitWriter, new_dataset
from nrcg.errors import DataError, NrcgError
from nrcg.files import atomic_write_text
from nrcg.processes import in_threads

PIECE_BYTES = 8_000_000
FORMAT = 1
"""Of the journal and of the pixels: a change makes unfinished conversions start anew."""
MORE_UNREADABLE = 100
"""So many unreadable files past the allowed ones are listed before the conversion gives up."""


@dataclass(frozen=True)
class _Piece:
    split: str
    start: int
    files: Sequence[Encoded]


@dataclass(frozen=True)
class _Decoded:
    """images (n, H, W, 3) uint8, zero where `reasons` (position in the piece -> words) has an entry."""

    images: NDArray[np.uint8]
    reasons: dict[int, str]
    sha256: str


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
    on_resume: Callable[[int], object] | None = None,
    on_images: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Decode, resize and store the images of a listing as a data set.

    Unreadable files are left out and listed in <folder>/unreadable.csv. The arrays depend neither on the number of
    workers nor on how often the conversion was stopped.

    Args:
        folder: of the data set.
        name, classes: for the manifest.
        image_size, preprocessing: see `nrcg.data.pixels.decode`.
        max_unreadable: largest share of the files that may be unreadable.
        settings: all that chose the images, for the manifest; other settings make another data set.
        workers: threads; None is one per processor. Pillow decodes and resizes without Python's lock.
        on_resume: called with the number of images that an earlier run has converted.
        on_images: called with the number of images that are done, after every piece.

    Returns:
        The manifest.

    Raises:
        DataError: no image for a split or class; too many unreadable files; or another process is writing.
    """
    folder = Path(folder)
    check_counts(listing.path, {split: listing.splits[split].labels for split in SPLITS}, classes)
    total = sum(len(listing.splits[split].labels) for split in SPLITS)
    identity = _identity(listing, settings, classes, image_size, preprocessing)
    size = max(1, PIECE_BYTES // (3 * image_size**2))
    generation = dict(settings) | {
        "preprocessing": preprocessing,
        "resampling": "Pillow bilinear, antialiased",
    }
    journal = _Journal(folder / "conversion.jsonl.partial", identity)
    with (
        journal,
        new_dataset(
            folder,
            name=name,
            source=listing.source,
            classes=classes,
            image_shape=(image_size, image_size, 3),
            num_images={split: len(listing.splits[split].labels) for split in SPLITS},
            generation=generation,
            resumable=True,
        ) as writers,
    ):
        unreadable = _Unreadable(folder / "unreadable.csv", listing, total, max_unreadable)
        digests: dict[tuple[str, int], str] = {}
        journal.open()
        for entry in journal.entries:
            _take_up(entry, listing, writers, unreadable, digests)
        done = sum(int(writer.written.sum()) for writer in writers.values())
        if on_resume is not None and done:
            on_resume(done)

        def work(piece: _Piece) -> tuple[_Piece, _Decoded]:
            return piece, _decode_piece(piece.files, image_size, preprocessing)

        for piece, decoded in in_threads(work, _missing_pieces(listing, writers, size), workers):
            split = listing.splits[piece.split]
            part = slice(piece.start, piece.start + len(piece.files))
            unreadable.add(piece.split, piece.start, decoded.reasons)
            writers[piece.split].write_piece(
                split.places[part], decoded.images, _with_gaps(split.labels[part], decoded.reasons)
            )
            digests[piece.split, piece.start] = decoded.sha256
            journal.add(piece, decoded)
            done += len(piece.files)
            if on_images is not None:
                on_images(done)
        unreadable.check()
        # Files are hashed as they are read: the data set can be told from one made of other files.
        generation["images_sha256"] = _digest(digests[key] for key in sorted(digests))
        generation["unreadable"] = {"count": len(unreadable.rows), "files": [row[1] for row in unreadable.rows]}
        unreadable.write()
    return load_manifest(folder)


def _missing_pieces(listing: Listing, writers: Mapping[str, SplitWriter], size: int) -> Iterator[_Piece]:
    for split in SPLITS:
        images = listing.splits[split]
        for start in range(0, len(images.labels), size):
            stop = min(start + size, len(images.labels))
            if not writers[split].written[images.places[start]]:
                yield _Piece(split, start, images.read(start, stop))


def _decode_piece(files: Sequence[Encoded], image_size: int, preprocessing: str) -> _Decoded:
    images = np.zeros((len(files), image_size, image_size, 3), np.uint8)
    reasons = {}
    digest = hashlib.sha256()
    for i, file in enumerate(files):
        try:
            data = file.read_bytes()
            digest.update(hashlib.sha256(data).digest())
            images[i] = decode(data, size=image_size, preprocessing=preprocessing)
        except UnreadableImage as error:
            reasons[i] = str(error)
        except (OSError, EOFError, zlib.error, ValueError) as error:  # the disk's, or a damaged archive's
            reasons[i] = " ".join(str(error).split()) or type(error).__name__
    return _Decoded(images, reasons, digest.hexdigest())


def _with_gaps(labels: NDArray[np.int64], reasons: Mapping[int, str]) -> NDArray[np.int64]:
    labels = labels.copy()
    labels[list(reasons)] = -1
    return labels


def _take_up(
    entry: dict[str, Any],
    listing: Listing,
    writers: Mapping[str, SplitWriter],
    unreadable: _Unreadable,
    digests: dict[tuple[str, int], str],
) -> None:
    """Count a piece of the journal as done, if its images are still there."""
    split, start = entry["split"], entry["start"]
    images: Split = listing.splits[split]
    part = slice(start, start + entry["count"])
    if writers[split].written[images.places[start]]:
        return  # a piece that had to be written anew stands there twice
    reasons = {int(i): reason for i, reason in entry["unreadable"].items()}
    if writers[split].take_up(images.places[part], _with_gaps(images.labels[part], reasons), entry["crc32"]):
        unreadable.add(split, start, reasons)
        digests[split, start] = entry["sha256"]


def _identity(
    listing: Listing, settings: Mapping[str, Any], classes: Sequence[str], image_size: int, preprocessing: str
) -> str:
    """Of what is converted, and how: pieces of equal identity fit together."""
    parts = [
        json.dumps([FORMAT, PIECE_BYTES, dict(settings), list(classes), image_size, preprocessing]),
        *listing.files,
    ]
    for split in SPLITS:
        images = listing.splits[split]
        parts += [images.labels.tobytes().hex(), images.places.tobytes().hex()]
    return _digest(parts)


def _digest(lines: Iterator[str] | Sequence[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


class _Unreadable:
    """The files that could not be read so far, and whether they are too many."""

    def __init__(self, path: Path, listing: Listing, total: int, share: float) -> None:
        self.path, self.listing, self.total, self.share = path, listing, total, share
        self.allowed = int(share * total + 1e-9)
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


class _Journal:
    """The pieces that are done: a line of JSON each, the first line saying of what. A context manager that removes
    the file when all is done or the data are wrong, but not when the process is stopped.

    Attributes:
        entries: of an earlier run with the same identity.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.entries: list[dict[str, Any]] = []
        self._file: IO[str] | None = None

    def __enter__(self) -> _Journal:
        return self

    def open(self) -> None:
        """Read what an earlier run did. To be called by the one process that writes the data set."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        whole = [entry for entry in map(_json_or_none, lines) if entry is not None]  # a kill may cut off the last one
        if whole and whole[0] == {"identity": self.identity}:
            self.entries = whole[1:]
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed on leaving)
            self._file.write("\n")  # ends a line that was cut off
        else:
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
            self._line({"identity": self.identity})

    def add(self, piece: _Piece, decoded: _Decoded) -> None:
        self._line(
            {
                "split": piece.split,
                "start": piece.start,
                "count": len(piece.files),
                "crc32": zlib.crc32(decoded.images),
                "sha256": decoded.sha256,
                "unreadable": decoded.reasons,
            }
        )

    def _line(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._file is None:
            return
        self._file.close()
        if kind is None or issubclass(kind, NrcgError):
            self.path.unlink(missing_ok=True)


def _json_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
