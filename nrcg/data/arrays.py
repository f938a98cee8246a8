"""Image data sets on disk: arrays that `np.load(mmap_mode="r")` opens, and a manifest that vouches for them.

<folder>/{train,val}/images.npy   (N, H, W, C) uint8
<folder>/{train,val}/labels.npy   (N,) int64, positions in the manifest's `classes`
<folder>/train/mean.npy           (H, W, C) float32 in [-1, 1], the mean training image
<folder>/dataset.json             the manifest, written last: where it is, the data set is whole
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nrcg.errors import DataError
from nrcg.files import read_record, sha256_file
from nrcg.layout import SPLITS

if TYPE_CHECKING:
    import torch


def load_manifest(folder: Path | str) -> dict[str, Any]:
    """The data set's manifest.

    Args:
        folder: of the data set.

    Raises:
        DataError: missing, or not a manifest.
    """
    folder = Path(folder)
    path = folder / "dataset.json"
    try:
        manifest = read_record(path)
    except FileNotFoundError:
        raise DataError("no such file, the data set is missing or unfinished", path) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", path) from None
    needed = ("name", "source", "classes", "image_size", "channels", "splits", "generation")
    absent = [key for key in needed if key not in manifest]
    absent += [f"splits.{split}" for split in SPLITS if split not in manifest.get("splits", ())]
    if absent:
        raise DataError(f"lacks {', '.join(absent)}", path)
    return manifest


def open_split(folder: Path | str, split: str) -> tuple[np.memmap, NDArray[np.int64]]:
    """Open one split, checking types, shapes and file sizes against the manifest.

    Args:
        folder: of the data set.
        split: "train" or "val".

    Returns:
        images (N, H, W, C) uint8, a read-only memory map, and labels (N,) int64 in memory.

    Raises:
        DataError: a file is missing, cut off, unreadable or not what the manifest says.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    folder = Path(folder)
    manifest = load_manifest(folder)
    num, size = manifest["splits"][split]["num_images"], manifest["image_size"]
    shape = (num, size, size, manifest["channels"])
    images = _open_array(folder / split / "images.npy", np.uint8, shape)
    labels = np.array(_open_array(folder / split / "labels.npy", np.int64, (num,)))
    try:
        check_labels(folder / split / "labels.npy", labels, len(manifest["classes"]))
    except DataError as error:
        raise DataError(str(error).split(": ", 1)[1], folder / split / "labels.npy") from None
    return images, labels


def mean_image(folder: Path | str) -> NDArray[np.float32]:
    """(C, H, W) float32 in [-1, 1]: the mean training image. Errors as in `open_split`."""
    folder = Path(folder)
    manifest = load_manifest(folder)
    shape = (manifest["image_size"], manifest["image_size"], manifest["channels"])
    mean = _open_array(folder / "train" / "mean.npy", np.float32, shape)
    return np.ascontiguousarray(mean.transpose(2, 0, 1))


def verify(folder: Path | str, sha256: Callable[[Path], str] = sha256_file) -> None:
    """Read every file of the data set and compare its SHA-256 with the manifest's.

    Args:
        sha256: gives a file's checksum.

    Raises:
        DataError: naming the first file that is not what was written.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    for split in SPLITS:
        open_split(folder, split)
        for name, expected in manifest["splits"][split]["sha256"].items():
            path = folder / split / f"{name}.npy"
            if not path.is_file():
                raise DataError("no such file", path)
            if sha256(path) != expected and sha256_file(path) != expected:  # the first may remember wrongly
                raise DataError("has changed since it was written (SHA-256 differs)", path)


def check_labels(path: Path, labels: NDArray[np.int64], num_classes: int) -> None:
    """Raises DataError where a label is no position among the classes."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path}: labels go from {labels.min()} to {labels.max()}, but there are {num_classes} classes")


def _open_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """Map a .npy file that must hold exactly `shape` items of `dtype`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError("no such file", path) from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"is cut off or unreadable ({error})", path) from None
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != shape:
        got = f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}"
        raise DataError(f"holds {got}, the manifest says {np.dtype(dtype)} {shape}", path)
    whole, found = array.offset + array.nbytes, path.stat().st_size
    if whole != found:
        raise DataError(f"has {found} bytes, its header says {whole}", path)
    return array


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
