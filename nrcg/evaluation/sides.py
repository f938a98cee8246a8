"""Anybody's images or features, read as a stream: folders of image files, arrays and archives."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nrcg.data.folders import image_names
from nrcg.data.pixels import decode, resize
from nrcg.data.sources import mixed_order
from nrcg.errors import DataError
from nrcg.processes import in_threads, processors

CHUNK = 256
CHUNK_BYTES = 2**28
UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged archive raises."""
HEADINGS = ("label", "labels", "class", "target", "category", "y")
ImageList = list[np.ndarray]
"""(H, W, C) uint8 each, of one or several sizes."""


@dataclass(frozen=True)
class Side:
    """The samples or the reference.

    Attributes:
        path: As it was given.
        count: Number of images or feature vectors.
        channels: 1 or 3; None for files, which are read as RGB whatever they hold.
        labels: (count,) str, in the order of `chunks`, or None.
        chunks: Reads the images from the first on.
        features: (count, dim), where the side holds these instead of images.
        image_size: Size that images are resized to.
        names: Of the files, relative to the folder, in the order of `chunks`; None for arrays.
    """

    path: Path
    count: int
    channels: int | None = None
    labels: np.ndarray | None = None
    chunks: Callable[[], Iterator[ImageList]] = lambda: iter(())
    features: np.ndarray | None = None
    image_size: int | None = None
    names: list[str] | None = None


def open_side(path: str | Path, *, labels: str | Path | None = None, image_size: int | None = None) -> Side:
    """ImageList or features at a path; nothing but headers and names is read yet.

    Args:
        path: a folder of image files (its subfolders too, in an order that mixes them), or one that `nrcg sample` or
            the workflow wrote; a .npy of (N, H, W, C) or (N, H, W) uint8 images; a .npz with these as arr_0, as
            guided-diffusion writes it; a .npy of (N, dim) floating-point features.
        labels: a .npy of (N,) numbers or texts, in the order of the array or of the sorted file names; or a CSV: a
            label a line for an array, file name and label a line for a folder, with or without a header. None: the
            names of the folder's subfolders, or arr_1 of the archive, where there are such.
        image_size: all images are resized to this many pixels squared, by Pillow's bilinear filter; None: as they are.

    Raises:
        DataError: nothing there, no image, or an array of another kind; labels that do not fit.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "samples.npy").is_file() and (path / "samples.json").is_file():  # by `nrcg sample`
            return _open_arrays(path, [path / "samples.npy"], labels, image_size)
        shards = sorted(file for file in path.glob("shard*.npy") if file.with_suffix(".json").is_file())
        if shards:  # by the workflow; a picture of the trace may lie beside them
            return _open_arrays(path, shards, labels, image_size)
        names, _ = image_names(path, path)
        return _open_folder(path, names, labels, image_size)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        return _open_archive(path, labels, image_size)
    if path.suffix != ".npy":
        raise DataError(f"{path}: expected a folder of images, a .npy or a .npz file")
    return _open_arrays(path, [path], labels, image_size)


def _open_folder(path: Path, names: list[str], labels: str | Path | None, image_size: int | None) -> Side:
    if not names:
        raise DataError(f"{path}: holds no image; names must end in .png, .jpg, .webp or the like")
    names = sorted(names)
    found = None
    if labels is not None:
        found = _read_labels(Path(labels), len(names), names)
    elif all("/" in name for name in names):
        found = np.array([name.partition("/")[0] for name in names])
    order = mixed_order(names, seed=0)

    def read(name: str) -> np.ndarray:
        try:
            return decode((path / name).read_bytes(), size=image_size, preprocessing="squash")
        except (DataError, OSError) as error:
            raise DataError(f"{path / name}: {error}") from error

    def chunks() -> Iterator[ImageList]:
        yield from _chunked(in_threads(read, [names[i] for i in order], min(8, processors())))

    return Side(
        path,
        len(names),
        labels=None if found is None else found[order],
        chunks=chunks,
        image_size=image_size,
        names=[names[i] for i in order],
    )


def _chunked(images: Iterator[np.ndarray]) -> Iterator[ImageList]:
    """Lists of CHUNK images, or fewer where they are large."""
    chunk: ImageList = []
    for image in images:
        chunk.append(image)
        if len(chunk) == CHUNK or sum(one.nbytes for one in chunk) > CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _open_arrays(path: Path, files: list[Path], labels: str | Path | None, image_size: int | None) -> Side:
    arrays = []
    for file in files:
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: no .npy array that can be read ({' '.join(str(error).split())})") from None
    first = arrays[0]
    count = sum(map(len, arrays)) if first.ndim else 0
    found = None if labels is None else _read_labels(Path(labels), count)
    if len(arrays) == 1 and first.ndim == 2 and first.dtype.kind == "f":
        return Side(path, count, labels=found, features=first)
    for file, array in zip(files, arrays, strict=True):
        if _check_array(file, array.shape, array.dtype) != _check_array(files[0], first.shape, first.dtype):
            raise DataError(f"{file}: has {array.shape[-1]} channels, {files[0].name} beside it has not")

    def chunks() -> Iterator[ImageList]:
        rows = (row for array in arrays for row in array)
        yield from _chunked(_as_images(rows, image_size))

    return Side(path, count, _check_array(files[0], first.shape, first.dtype), found, chunks, image_size=image_size)


def _open_archive(path: Path, labels: str | Path | None, image_size: int | None) -> Side:
    """ImageList from arr_0, read as a stream: np.load would unpack all of them at once."""
    with _archive(path, "arr_0") as file:
        shape, fortran, dtype = _header(file, path)
    channels = _check_array(path, shape, dtype)
    if fortran:
        raise DataError(f"{path}: arr_0 is stored column by column; save np.ascontiguousarray of it")
    found = None
    if labels is not None:
        found = _read_labels(Path(labels), shape[0])
    else:
        try:
            with np.load(path, allow_pickle=False) as archive:
                if "arr_1" in archive.files and archive["arr_1"].shape == shape[:1]:
                    found = archive["arr_1"].astype(str)
        except UNREADABLE as error:
            raise DataError(f"{path}: its labels, arr_1, cannot be read ({error})") from None

    def rows() -> Iterator[np.ndarray]:
        size = int(np.prod(shape[1:]))
        with _archive(path, "arr_0") as file:
            _header(file, path)
            for _ in range(shape[0]):
                try:
                    data = file.read(size)
                except UNREADABLE as error:
                    raise DataError(f"{path}: damaged ({error})") from None
                if len(data) < size:
                    raise DataError(f"{path}: cut off")
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    return Side(
        path, shape[0], channels, found, lambda: _chunked(_as_images(rows(), image_size)), image_size=image_size
    )


def _archive(path: Path, name: str):
    try:
        return zipfile.ZipFile(path).open(f"{name}.npy")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no .npz archive with the images as {name} ({error})") from None


def _header(file, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except UNREADABLE as error:
        raise DataError(f"{path}: damaged, arr_0 cannot be read ({error})") from None


def _check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Channels of an array of images. Raises DataError unless (N, H, W) or (N, H, W, 1 or 3) uint8."""
    if path.suffix == ".npz" and dtype.kind == "f" and len(shape) == 2:
        raise DataError(f"{path}: holds features; save them as a .npy of (N, dim)")
    if dtype != np.uint8:
        raise DataError(
            f"{path}: {dtype} of shape {shape}; images must be uint8, 0 to 255, and features floating-point (N, dim)"
        )
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise DataError(f"{path}: shape {shape}; images must be (N, H, W) or (N, H, W, 1 or 3)")
    if len(shape) == 3 and shape[2] in (3, 4):
        raise DataError(f"{path}: shape {shape}: one image; (N, H, W, 3) or, of grey images, (N, H, W) is needed")
    channels = shape[3] if len(shape) == 4 else 1
    if channels not in (1, 3):
        hint = "; move the channels to the end" if shape[1] in (1, 3) else ""
        raise DataError(f"{path}: shape {shape}: images must have 1 or 3 channels, not {channels}{hint}")
    return channels


def _as_images(rows: Iterator[np.ndarray], image_size: int | None) -> Iterator[np.ndarray]:
    for row in rows:
        image = np.asarray(row).reshape(*row.shape[:2], -1)
        yield image if image_size is None else resize(image, image_size)


def _read_labels(path: Path, count: int, names: Sequence[str] | None = None) -> np.ndarray:
    """(count,) texts, for an array or for sorted file names."""
    if path.suffix == ".npy":
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: no .npy array that can be read ({' '.join(str(error).split())})") from None
        if labels.dtype.kind not in "iubU":
            raise DataError(f"{path}: labels must be whole numbers or texts, not {labels.dtype}")
        if labels.shape != (count,):
            raise DataError(f"{path}: labels of shape {labels.shape} for {count} images; expected ({count},)")
        return labels.astype(str)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no .npy and no CSV that can be read ({error})") from None
    while lines and not any(lines[-1]):
        del lines[-1]
    for number, line in enumerate(lines, 1):
        if len(line) < (1 if names is None else 2) or not line[-1 if names is None else 1]:
            wanted = "a label" if names is None else "the file's name and its label"
            raise DataError(f"{path}, line {number}: expected {wanted}")
    if names is None:
        if len(lines) not in (count, count + 1):
            raise DataError(f"{path}: {len(lines)} lines for {count} images; expected a label a line")
        found = [line[-1] for line in lines]
        if len(lines) == count and found[0] not in found[1:] and _is_header(found):
            raise DataError(f"{path}: {count - 1} labels below the header {found[0]!r} for {count} images")
        return np.array(found[len(lines) - count :])
    by_name: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if by_name.setdefault(line[0], line[1]) != line[1]:
            raise DataError(f"{path}, line {number}: another label of {line[0]}: {line[1]}, before {by_name[line[0]]}")
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DataError(f"{path}: has no label for {len(missing)} of {count} images, such as {missing[0]}")
    return np.array([by_name[name] for name in names])


def _is_header(texts: list[str]) -> bool:
    """Whether the first is a word where the others are numbers, or a usual heading."""
    numbers = all(text.lstrip("+-").isdecimal() for text in texts[1:])
    return texts[0].lower() in HEADINGS or (numbers and not texts[0].lstrip("+-").isdecimal())


def with_channels(image: np.ndarray, channels: int | None, what: str = "the classifier") -> np.ndarray:
    """An (H, W, C) image with the channels that a network takes, where that loses nothing; None: as it is.

    Raises:
        DataError: a coloured image where `what` takes grey ones.
    """
    if channels == 3 and image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 1 and image.shape[2] == 3:
        if (image != image[..., :1]).any():
            raise DataError(f"{what} takes grey images, these are coloured")
        return image[..., :1]
    return image


def numbered(side: Side, count: int) -> Iterator[tuple[int, ImageList | np.ndarray]]:
    """Chunks of the first `count`, each with the number of its first."""
    first = 0
    if side.features is not None:
        for start in range(0, count, CHUNK * 16):
            rows = side.features[start : min(start + CHUNK * 16, count)]
            damaged = ~np.isfinite(rows).all(axis=1)
            if damaged.any():
                raise DataError(f"{side.path}: row {start + int(damaged.argmax())} holds a value that is not finite")
            yield start, rows
        return
    for chunk in side.chunks():
        chunk = chunk[: count - first]
        yield first, chunk
        first += len(chunk)
        if first == count:
            return


def in_parts(
    side: Side, count: int, size: int, shape: tuple[int, int, int], remedy: str = "--image-size resizes"
) -> Iterator[tuple[int, np.ndarray]]:
    """The first `count` images in parts of `size`, as a diffusion model takes them.

    Args:
        side: Images; grey ones get three channels where the model has these.
        count: Images in all.
        size: Images of a part; the last may have fewer.
        shape: (C, H, W) of the model's images.
        remedy: What a message says to do about an image of another size.

    Yields:
        Number of the first, and the images (n, H, W, C) uint8.

    Raises:
        DataError: features instead of images, or an image of another size.
    """
    channels, height, width = shape
    if side.features is not None:
        raise DataError(f"{side.path}: holds features, images are needed")
    waiting: list[np.ndarray] = []
    first = 0
    for _, chunk in numbered(side, count):
        for image in chunk:
            image = with_channels(image, channels, "the diffusion model")
            if image.shape != (height, width, channels):
                raise DataError(
                    f"{side.path}: holds an image of {' x '.join(map(str, image.shape))}, the model's are {height} x"
                    f" {width} x {channels}; {remedy}"
                )
            waiting.append(image)
        while len(waiting) >= size or (waiting and first + len(waiting) == count):
            yield first, np.stack(waiting[:size])
            first, waiting = first + min(size, len(waiting)), waiting[size:]
