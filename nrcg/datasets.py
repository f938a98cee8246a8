"""Image data sets on disk: arrays that `np.load(mmap_mode="r")` opens, and a manifest that vouches for them.

    <folder>/{train,val}/images.npy   (N, H, W, C) uint8
    <folder>/{train,val}/labels.npy   (N,) int64, positions in the manifest's `classes`
    <folder>/train/mean.npy           (H, W, C) float32 in [-1, 1], the mean training image
    <folder>/dataset.json             the manifest, written last: where it is, the data set is whole

Images are written piece by piece under a temporary name, which is changed when they are whole, so a data set may be
larger than the memory and a run that stops midway leaves nothing that looks finished. One process at a time writes a
data set: a lock file beside its folder sees to that.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nrcg import sportballs
from nrcg.errors import DataError, NrcgError
from nrcg.files import atomic_save_array, exclusive, naming, read_record, sha256_file, write_record
from nrcg.integrity import remedy
from nrcg.processes import processors

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val")
_PARTIAL = ".partial"
_PIECE_BYTES = 24_000_000


# --- Writing ----------------------------------------------------------------------------------------------------


class SplitWriter:
    """Writes one split in pieces, in any order; a context manager that removes unfinished files.

    Args:
        folder: of the split, made if need be.
        num_images: N > 0, known beforehand.
        image_shape: (H, W, C).
        resumable: leave unfinished files where they are when the writing process is stopped (but not when the data
            turn out to be wrong), and take such files up: see `take_up`.

    Attributes:
        total: (H, W, C) float64, the running sum of the images; exact, so the order of pieces does not matter.
        written: (N,) bool, places that have been written.
    """

    def __init__(
        self, folder: Path | str, num_images: int, image_shape: tuple[int, int, int], *, resumable: bool = False
    ) -> None:
        if num_images < 1:
            raise DataError(f"{folder}: a split needs at least one image")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total = np.zeros(image_shape, np.float64)
        self.written = np.zeros(num_images, bool)
        self._labels = np.zeros(num_images, np.int64)
        self._resumable = resumable
        self._path = self.folder / f"images.npy{_PARTIAL}"
        header = _npy_header((num_images, *image_shape))
        self._offset, self._row = len(header), math.prod(image_shape)
        size = self._offset + num_images * self._row
        # Written through a file, not a memory map, whose pages would count as the process's memory.
        if not (resumable and self._path.exists() and self._path.stat().st_size == size):
            with self._path.open("wb") as file:
                file.truncate(size)  # sparse: nothing is written yet
        self._file = os.open(self._path, os.O_RDWR)
        with naming(self._path):
            os.pwrite(self._file, header, 0)

    def write_piece(
        self, place: int | NDArray[np.integer], images: NDArray[np.uint8], labels: NDArray[np.int64]
    ) -> None:
        """Store n images.

        Args:
            place: position of the first image in the split, the others following, or the position of each.
            images: (n, H, W, C) uint8.
            labels: (n,) integers; -1 is a gap, an image that could not be had: `finish` closes the gaps.

        Raises:
            DataError: wrong shape or type, beyond the end, or a place that has been written before.
        """
        places = place + np.arange(len(images)) if np.ndim(place) == 0 else np.asarray(place)
        if images.dtype != np.uint8 or images.shape[1:] != self.total.shape or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.folder}: a piece must be uint8 (n, {', '.join(map(str, self.total.shape))}) with (n,)"
                f" labels, got {images.dtype} {images.shape} with {labels.shape}"
            )
        if places.min() < 0 or places.max() >= len(self.written) or self.written[places].any():
            raise DataError(
                f"{self.folder}: images {places.min()} .. {places.max()} of {len(self.written)}"
                " lie beyond the end or were written before"
            )
        for first, stop in _runs(places):
            self._write(int(places[first]), images[first:stop])
        self._count(places, images, labels)

    def take_up(self, places: NDArray[np.integer], labels: NDArray[np.int64], crc32: int) -> bool:
        """Count images of an earlier, stopped process as written, where they still are what it wrote.

        Args:
            places: (n,) positions.
            labels: (n,) integers, as for `write_piece`.
            crc32: of the images' bytes in this order.

        Returns:
            Whether they are; if not, they have to be written.
        """
        images = np.concatenate([self._read(int(places[a]), b - a) for a, b in _runs(places)])
        if zlib.crc32(images) != crc32:
            return False
        self._count(places, images, labels)
        return True

    def _count(self, places: NDArray[np.integer], images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._labels[places] = labels
        self.written[places] = True
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

    def _read(self, place: int, count: int) -> NDArray[np.uint8]:
        data = os.pread(self._file, count * self._row, self._offset + place * self._row)
        return np.frombuffer(data, np.uint8).reshape(-1, *self.total.shape)

    def finish(self, classes: Sequence[str]) -> dict[str, Any]:
        """Move the whole arrays to their final names and return the split's entry of the manifest.

        Raises:
            DataError: images are missing or a label is not a position in `classes`.
        """
        missing = int((~self.written).sum())
        if missing:
            raise DataError(f"{self.folder}: {missing} of {len(self.written)} images were never written")
        labels = self._close_gaps()
        _check_labels(self.folder, labels, len(classes))
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
        at_once = max(1, _PIECE_BYTES // self._row)
        for first, stop in _runs(kept):
            for s in range(first, stop, at_once):
                self._write(s, self._read(int(kept[s]), min(at_once, stop - s)))
        header = _npy_header((len(kept), *self.total.shape))
        assert len(header) == self._offset  # numpy pads headers so that the first axis may change
        os.pwrite(self._file, header, 0)
        os.truncate(self._file, self._offset + len(kept) * self._row)
        return self._labels[kept]

    @property
    def mean(self) -> NDArray[np.float32]:
        """(H, W, C) float32 in [-1, 1]: mean of the images written so far."""
        return (self.total / (self._labels[self.written] >= 0).sum() / 127.5 - 1).astype(np.float32)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._close()
        stopped = kind is not None and not issubclass(kind, NrcgError)
        if not (self._resumable and stopped):
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
    resumable: bool = False,
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
        resumable: see `SplitWriter`.

    Raises:
        DataError: see `SplitWriter`; or another process is writing this data set.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        # Beside the folder, which then holds nothing but the data set.
        lock = folder.with_name(f".{folder.name}.lock")
        stack.enter_context(exclusive(lock, f"{folder}: another process is writing this data set; wait until it ends"))
        writers = {
            split: stack.enter_context(SplitWriter(folder / split, num_images[split], image_shape, resumable=resumable))
            for split in SPLITS
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


def write_sportballs(
    folder: Path | str,
    *,
    image_size: int,
    classes: Sequence[str],
    num_train: int,
    num_val: int,
    diameter: tuple[float, float],
    seed: int,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    name: str = "sportballs",
) -> dict[str, Any]:
    """Draw and store SportBalls: images 0 .. num_train - 1 of `seed` train, the next num_val validate.

    Args:
        folder: of the data set.
        image_size, classes, diameter, seed: see `nrcg.sportballs.attributes`.
        num_train, num_val: images per split.
        workers: threads that draw; None is one per processor this process may use. The files do not depend on it.
        progress: called with (images done, images in all) after every piece.
        name: of the data set, for its manifest.

    Returns:
        The manifest.

    Raises:
        ConfigError: an argument out of range.
        DataError: see `SplitWriter`.
    """
    drawing = {"image_size": image_size, "classes": list(classes), "diameter": list(diameter)}
    counts = {"num_train": num_train, "num_val": num_val}
    sportballs.attributes(seed, [], image_size=image_size, classes=classes, diameter=diameter)  # checks
    with new_dataset(
        folder,
        name=name,
        source="drawn by nrcg.sportballs",
        classes=classes,
        image_shape=(image_size, image_size, 3),
        num_images={"train": num_train, "val": num_val},
        generation={"seed": seed, **drawing, **counts},
    ) as writers:
        size = max(1, _PIECE_BYTES // (3 * image_size**2))

        def draw(piece: tuple[str, int, int]) -> tuple[str, int, NDArray[np.uint8], NDArray[np.int64]]:
            split, start, stop = piece
            offset = num_train if split == "val" else 0
            images, labels = sportballs.render(
                seed,
                np.arange(offset + start, offset + stop),
                image_size=image_size,
                classes=classes,
                diameter=diameter,
            )
            return split, start, images, labels

        done = 0
        pieces = [
            (split, s, min(s + size, n))
            for split, n in zip(SPLITS, (num_train, num_val), strict=True)
            for s in range(0, n, size)
        ]
        with _one_torch_thread_each() as initializer:
            for split, start, images, labels in in_threads(draw, pieces, workers, initializer):
                writers[split].write_piece(start, images, labels)
                done += len(images)
                if progress is not None:
                    progress(done, num_train + num_val)
    return load_manifest(folder)


@contextmanager
def _one_torch_thread_each() -> Iterator[Callable[[], None]]:
    """Yield what a thread calls at its start to use one torch thread; afterwards torch is as it was."""
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def in_threads(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int | None,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yield work(item) in order, from threads, with few items and results waiting.

    Args:
        items: taken one by one as they are needed, in the caller's thread.
        workers: threads; None is one per processor this process may use.
        initializer: called at the start of each thread.
    """
    workers = workers or processors()
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(workers, initializer=initializer) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _damaged(path: Path, what: str, folder: Path, remake: str | None) -> DataError:
    hint = remake or remedy(path, f"restore it, or make {folder} anew (see nrcg dataset --help)")
    return DataError(f"{path}: {' '.join(what.split())}; {hint}")


def load_manifest(folder: Path | str, *, remake: str | None = None) -> dict[str, Any]:
    """The data set's manifest.

    Args:
        folder: of the data set.
        remake: what the error tells the user to do, such as "run: snakemake data/mine/dataset.json"; by default
            the command that makes a data set.

    Raises:
        DataError: missing, or not a manifest.
    """
    folder = Path(folder)
    path = folder / "dataset.json"
    try:
        manifest = read_record(path)
    except FileNotFoundError:
        raise _damaged(path, "no such file, the data set is missing or unfinished", folder, remake) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({error})", folder, remake) from None
    needed = ("name", "source", "classes", "image_size", "channels", "splits", "generation")
    absent = [key for key in needed if key not in manifest]
    absent += [f"splits.{split}" for split in SPLITS if split not in manifest.get("splits", ())]
    if absent:
        raise _damaged(path, f"lacks {', '.join(absent)}", folder, remake)
    return manifest


def open_split(folder: Path | str, split: str, *, remake: str | None = None) -> tuple[np.memmap, NDArray[np.int64]]:
    """Open one split, checking types, shapes and file sizes against the manifest.

    Args:
        folder: of the data set.
        split: "train" or "val".
        remake: see `load_manifest`.

    Returns:
        images (N, H, W, C) uint8, a read-only memory map, and labels (N,) int64 in memory.

    Raises:
        DataError: a file is missing, cut off, unreadable or not what the manifest says.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    folder = Path(folder)
    manifest = load_manifest(folder, remake=remake)
    num, size = manifest["splits"][split]["num_images"], manifest["image_size"]
    shape = (num, size, size, manifest["channels"])
    images = _open_array(folder / split / "images.npy", np.uint8, shape, folder, remake)
    labels = np.array(_open_array(folder / split / "labels.npy", np.int64, (num,), folder, remake))
    try:
        _check_labels(folder / split / "labels.npy", labels, len(manifest["classes"]))
    except DataError as error:
        raise _damaged(folder / split / "labels.npy", str(error).split(": ", 1)[1], folder, remake) from None
    return images, labels


def mean_image(folder: Path | str, *, remake: str | None = None) -> NDArray[np.float32]:
    """(C, H, W) float32 in [-1, 1]: the mean training image. `remake` and errors as in `open_split`."""
    folder = Path(folder)
    manifest = load_manifest(folder, remake=remake)
    shape = (manifest["image_size"], manifest["image_size"], manifest["channels"])
    mean = _open_array(folder / "train" / "mean.npy", np.float32, shape, folder, remake)
    return np.ascontiguousarray(mean.transpose(2, 0, 1))


def verify(folder: Path | str, *, remake: str | None = None, sha256: Callable[[Path], str] = sha256_file) -> None:
    """Read every file of the data set and compare its SHA-256 with the manifest's.

    Args:
        sha256: gives a file's checksum.

    Raises:
        DataError: naming the first file that is not what was written.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, remake=remake)
    for split in SPLITS:
        open_split(folder, split, remake=remake)
        for name, expected in manifest["splits"][split]["sha256"].items():
            path = folder / split / f"{name}.npy"
            if not path.is_file():
                raise _damaged(path, "no such file", folder, remake)
            if sha256(path) != expected and sha256_file(path) != expected:  # the first may remember wrongly
                raise _damaged(path, "has changed since it was written (SHA-256 differs)", folder, remake)


def _check_labels(path: Path, labels: NDArray[np.int64], num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path}: labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes")


def _open_array(path: Path, dtype: type, shape: tuple[int, ...], folder: Path, remake: str | None) -> np.memmap:
    """Map a .npy file that must hold exactly `shape` items of `dtype`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise _damaged(path, "no such file", folder, remake) from None
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f"is cut off or unreadable ({error})", folder, remake) from None
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != shape:
        got = f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}"
        raise _damaged(path, f"holds {got}, the manifest says {np.dtype(dtype)} {shape}", folder, remake)
    whole, found = array.offset + array.nbytes, path.stat().st_size
    if whole != found:
        raise _damaged(path, f"has {found} bytes, its header says {whole}", folder, remake)
    return array


# --- Pixels and tensors -----------------------------------------------------------------------------------------


def to_unit(images: NDArray[np.uint8]) -> torch.Tensor:
    """(N, H, W, C) uint8 images as a contiguous (N, C, H, W) float32 tensor in [-1, 1]: x / 127.5 - 1."""
    import torch

    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"need (N, H, W, C) uint8 images, got {images.dtype} of shape {images.shape}")
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(planes).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) tensor in [-1, 1] as (N, H, W, C) uint8: rounded, clamped; NaN becomes 0.

    The inverse of `to_unit`, exactly. Any floating type and device.
    """
    import torch

    if images.ndim != 4:
        raise ValueError(f"need an (N, C, H, W) tensor, got shape {tuple(images.shape)}")
    levels = images.detach().to(torch.float32).add(1).mul(127.5).nan_to_num(nan=0.0).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
