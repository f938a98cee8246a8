"""Writing a data set: its arrays piece by piece under temporary names, its manifest last.

A data set may be larger than the memory, and a run that stops midway leaves nothing that looks finished: it is made
anew. One process at a time writes a data set; a lock file beside its folder sees to that.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrcg.data.arrays import check_labels
from nrcg.errors import DataError
from nrcg.files import atomic_save_array, exclusive, naming, sha256_file, temporary_name, write_record
from nrcg.layout import SPLITS

PIECE_BYTES = 24_000_000
"""Images written or moved at a time."""
GAP, UNWRITTEN = -1, -2
"""Labels of an image that could not be had, and of one that is yet to come."""


class SplitWriter:
    """Writes one split in pieces, in any order; a context manager that removes unfinished files.

    Args:
        folder: Folder of the split, made if need be.
        num_images: N > 0, known beforehand.
        image_shape: (H, W, C).

    Attributes:
        total: (H, W, C) float64, the running sum of the images; exact, so the order of pieces does not matter.
    """

    def __init__(self, folder: Path | str, num_images: int, image_shape: tuple[int, int, int]) -> None:
        if num_images < 1:
            raise DataError(f"{folder}: a split needs at least one image")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total = np.zeros(image_shape, np.float64)
        self._labels = np.full(num_images, UNWRITTEN, np.int64)
        self._path = temporary_name(self.folder / "images.npy")
        header = _npy_header((num_images, *image_shape))
        self._offset, self._row = len(header), math.prod(image_shape)
        # Written through a file, not a memory map, whose pages would count as the process's memory.
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        with naming(self._path):
            os.pwrite(self._file, header, 0)

    def write_piece(
        self, place: int | NDArray[np.integer], images: NDArray[np.uint8], labels: NDArray[np.int64]
    ) -> None:
        """Store n images.

        Args:
            place: Position of the first image in the split, the others following, or the position of each.
            images: (n, H, W, C) uint8.
            labels: (n,) integers; GAP is an image that could not be had, which `finish` leaves out.

        Raises:
            DataError: Wrong shape or type, beyond the end, or a place that has been written before.
        """
        places = place + np.arange(len(images)) if np.ndim(place) == 0 else np.asarray(place)
        if images.dtype != np.uint8 or images.shape[1:] != self.total.shape or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.folder}: a piece must be uint8 (n, {', '.join(map(str, self.total.shape))}) with (n,)"
                f" labels, got {images.dtype} {images.shape} with {labels.shape}"
            )
        end = len(self._labels)
        if places.min() < 0 or places.max() >= end or (self._labels[places] != UNWRITTEN).any():
            raise DataError(
                f"{self.folder}: images {places.min()} .. {places.max()} of {end} lie beyond the end or were written"
                " before"
            )
        for first, stop in _runs(places):
            self._write(int(places[first]), images[first:stop])
        self._labels[places] = labels
        real = images if labels.min(initial=0) >= 0 else images[labels >= 0]
        # 65,536 images of 255 fit in 32 bits, which add up several times faster than float64.
        for s in range(0, len(real), 65536):
            self.total += real[s : s + 65536].sum(axis=0, dtype=np.uint32)

    def _write(self, place: int, images: NDArray[np.uint8]) -> None:
        data, offset = memoryview(np.ascontiguousarray(images)).cast("B"), self._offset + place * self._row
        with naming(self._path):
            while data:  # one call writes 2 GiB at most
                done = os.pwrite(self._file, data, offset)
                data, offset = data[done:], offset + done

    def finish(self, classes: Sequence[str]) -> dict[str, Any]:
        """Move the whole arrays to their final names and return the split's entry of the manifest.

        Raises:
            DataError: Images are missing or a label is not a position in `classes`.
        """
        missing = int((self._labels == UNWRITTEN).sum())
        if missing:
            raise DataError(f"{self.folder}: {missing} of {len(self._labels)} images were never written")
        labels = self._close_gaps()
        check_labels(self.folder, labels, len(classes))
        os.fsync(self._file)
        self._close()
        atomic_save_array(self.folder / "labels.npy", labels)
        self._path.replace(self.folder / "images.npy")
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        return {
            "num_images": len(labels),
            "class_counts": dict(zip(classes, counts, strict=True)),
            "sha256": {name: sha256_file(self.folder / f"{name}.npy") for name in ("images", "labels")},
        }

    def _close_gaps(self) -> NDArray[np.int64]:
        """Move the images behind a gap forward; the labels that are left."""
        kept = np.flatnonzero(self._labels >= 0)
        if len(kept) == len(self._labels):
            return self._labels
        if not len(kept):
            raise DataError(f"{self.folder}: no image of this split could be read")
        written = np.load(self._path, mmap_mode="r", allow_pickle=False)
        at_once = max(1, PIECE_BYTES // self._row)
        for s in range(0, len(kept), at_once):
            self._write(s, written[kept[s : s + at_once]])
        header = _npy_header((len(kept), *self.total.shape))
        assert len(header) == self._offset  # numpy pads headers so that the first axis may change
        os.pwrite(self._file, header, 0)
        os.truncate(self._file, self._offset + len(kept) * self._row)
        return self._labels[kept]

    @property
    def mean(self) -> NDArray[np.float32]:
        """(H, W, C) float32 in [-1, 1]: mean of the images written so far."""
        return (self.total / (self._labels >= 0).sum() / 127.5 - 1).astype(np.float32)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        self._path.unlink(missing_ok=True)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of a uint8 array in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _runs(places: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """[first, stop) of each stretch of `places` that counts up by one."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    return pairwise([0, *breaks.tolist(), len(places)])


@contextmanager
def new_dataset(
    folder: Path | str,
    *,
    name: str,
    source: str,
    classes: Sequence[str],
    image_shape: tuple[int, int, int],
    num_images: Mapping[str, int],
    generation: Mapping[str, Any],
) -> Iterator[dict[str, SplitWriter]]:
    """Yield a `SplitWriter` per split; on leaving without an error, finish both and write the manifest.

    Args:
        folder: of the data set. A manifest that is there already is removed first.
        name, source: of the data, for the manifest; `source` says where the images come from.
        classes: names, in the order of the labels.
        image_shape: (H, W, C) with H = W.
        num_images: of "train" and of "val".
        generation: the arguments that make this data set anew, for the manifest. What is added to it before leaving
            is in the manifest too.

    Raises:
        DataError: see `SplitWriter`; or another process is writing this data set.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        # Beside the folder, which then holds nothing but the data set.
        lock = folder.with_name(f".{folder.name}.lock")
        stack.enter_context(exclusive(lock, f"{folder}: another process is writing this data set; wait until it ends"))
        writers = {
            split: stack.enter_context(SplitWriter(folder / split, num_images[split], image_shape)) for split in SPLITS
        }
        (folder / "dataset.json").unlink(missing_ok=True)
        yield writers
        splits = {split: writer.finish(classes) for split, writer in writers.items()}
        atomic_save_array(folder / "train" / "mean.npy", writers["train"].mean)
        splits["train"]["sha256"]["mean"] = sha256_file(folder / "train" / "mean.npy")
        manifest = {
            "name": name,
            "source": source,
            "classes": list(classes),
            "image_size": image_shape[0],
            "channels": image_shape[2],
            "splits": splits,
            "generation": dict(generation),
        }
        write_record(folder / "dataset.json", manifest)
