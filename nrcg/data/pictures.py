"""Samples as pictures: read back, laid out in a grid, encoded as PNG."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from nrcg.data.shards import read_shard
from nrcg.errors import DataError
from nrcg.files import atomic_write
from nrcg.layout import format_scale


def load_samples(samples_dir: str | os.PathLike, method: str, scale: float, count: int) -> np.ndarray | None:
    """The first samples of a method at a scale.

    Returns:
        (n, H, W, C) uint8 with n <= count, or None where none were kept.

    Raises:
        DataError: the file is no such array.
    """
    parts: list[np.ndarray] = []
    for path in sorted((Path(samples_dir) / method / f"scale{format_scale(scale)}").glob("shard*.npy")):
        if sum(map(len, parts)) < count:
            parts.append(_load_shard(path))
    return np.concatenate(parts)[:count] if parts else None


def _load_shard(path: Path) -> np.ndarray:
    """A shard's images, checked against its record where it has one."""
    if path.with_suffix(".json").exists():
        images, _ = read_shard(path)
    else:
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"no array of samples ({error})", path) from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise DataError(
            f"{path}: {images.dtype} {images.shape} where uint8 (n, H, W, 1 or 3) is expected; "
            "delete it and run snakemake again"
        )
    return images


def sample_grid(images: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """Tile images on a light grey ground, row by row.

    Args:
        images: (N, H, W, C) uint8, N >= 1.
        columns: images per row.
        pad: pixels between the images and around them.

    Returns:
        (rows * (H + pad) + pad, columns * (W + pad) + pad, C) uint8; places without an image stay grey.

    Raises:
        ValueError: another dtype or number of axes, no images, columns < 1 or pad < 0.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"images: expected uint8 (N, H, W, C) with N >= 1, got {images.dtype} {images.shape}")
    if columns < 1 or pad < 0:
        raise ValueError(f"columns must be >= 1 and pad >= 0, got {columns} and {pad}")
    count, height, width, channels = images.shape
    grid_rows = math.ceil(count / columns)
    grid = np.full((grid_rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 214, np.uint8)
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def png_bytes(array: np.ndarray) -> bytes:
    """An image as PNG.

    Args:
        array: (H, W), (H, W, 1) or (H, W, 3) uint8.

    Raises:
        ValueError: another shape or dtype.
    """
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise ValueError(f"array: expected uint8 (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} {array.shape}")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write an image (see png_bytes) as a PNG file, whole or not at all."""
    atomic_write(path, png_bytes(array))
