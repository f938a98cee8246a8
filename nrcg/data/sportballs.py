"""SportBalls: one ball on a white canvas, at a random place, size and rotation (a synthetic data set).

After the SportBalls data of arXiv 2507.00687, sec. 4, with balls of our own drawing. Image i is a function of
(seed, i) alone, bit for bit: a counter-based generator gives every attribute its own draw, and no operation
below mixes two images. So it matters neither how many images are made nor in what order, batch or thread.

Drawing happens in two steps. Once per ball: `_master` evaluates its pattern on the sphere at high resolution
and `texture` low-passes it to the pixel grid of one size bucket. Then, many images at a time: each texture is
sampled bilinearly, rotated, over the bounding box of the balls that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nrcg.data.arrays import load_manifest
from nrcg.data.ball_textures import BUCKETS, CLASSES, MARGIN, TEXELS, Array, texture, texture_side
from nrcg.data.writing import PIECE_BYTES, new_dataset
from nrcg.errors import ConfigError
from nrcg.layout import SPLITS
from nrcg.processes import in_threads


# nrcg.diffusion.noise has the same generator in torch, for noise on a GPU; this module does without torch.
def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        counter: (4, n) words below 2**32.
        key: two words below 2**32.

    Returns:
        (4, n) random words below 2**32, in uint64.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _draws(seed: int, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(8, n) independent 32-bit words for each index: two Philox blocks, counted by the third word."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    low, high = indices & np.uint64(0xFFFFFFFF), indices >> np.uint64(32)
    zero = np.zeros_like(indices)
    return np.concatenate([philox4x32(np.stack([low, high, zero + np.uint64(b), zero]), key) for b in (0, 1)])


# Rotations are multiples of 1/65536 turn, so cosines come from a table: numpy's vectorised cos may round
# differently in the tail of an array, and that would depend on the batch.
_TURN = 65536


@dataclass(frozen=True)
class Attributes:
    """What was drawn for n images. Pixels are counted from the canvas's top left corner.

    Attributes:
        label: (n,) int64, index into `classes`.
        diameter: (n,) float64, pixels.
        x, y: (n,) float64, the ball's centre, pixels; uniform over the places that keep the ball inside.
        rotation: (n,) float64, radians in [0, 2 pi), counter-clockwise as seen.
    """

    label: NDArray[np.int64]
    diameter: Array
    x: Array
    y: Array
    rotation: Array


def attributes(
    seed: int,
    indices: ArrayLike,
    *,
    image_size: int,
    classes: Sequence[str],
    diameter: tuple[float, float],
) -> Attributes:
    """The independent draws behind images `indices`, one uniform number each.

    Args:
        seed: of the data set, 0 <= seed < 2**64.
        indices: (n,) non-negative integers, any order, repeats allowed.
        image_size: side of the square canvas in pixels.
        classes: names out of `CLASSES`; a label is the position here.
        diameter: smallest and largest diameter as fractions of the canvas, in (0, 1].

    Raises:
        ConfigError: an argument out of range, or a class that cannot be drawn.
    """
    index = _check(seed, indices, image_size, classes, diameter)
    words = _draws(seed, index)
    uniform = (words[:3].astype(np.float64) + 0.5) * 2.0**-32  # in (0, 1), never an end
    size = image_size * (diameter[0] + (diameter[1] - diameter[0]) * uniform[0])
    return Attributes(
        label=((words[4] * np.uint64(len(classes))) >> np.uint64(32)).astype(np.int64),
        diameter=size,
        x=size / 2 + (image_size - size) * uniform[1],
        y=size / 2 + (image_size - size) * uniform[2],
        rotation=(words[3] >> np.uint64(16)).astype(np.float64) * (2 * np.pi / _TURN),
    )


def _check(
    seed: int, indices: ArrayLike, image_size: int, classes: Sequence[str], diameter: tuple[float, float]
) -> NDArray[np.uint64]:
    """The indices as uint64, once every argument has been found sound."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed: {seed} is not in 0 .. 2**64 - 1")
    if image_size < 8:
        raise ConfigError(f"image_size: {image_size} is under 8 pixels")
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise ConfigError(f"classes: {list(classes)} must be distinct names out of {', '.join(CLASSES)}")
    if not 0 < diameter[0] <= diameter[1] <= 1:
        raise ConfigError(f"diameter: {tuple(diameter)} must be fractions of the canvas, 0 < low <= high <= 1")
    index = np.asarray(indices)
    if index.ndim != 1 or (index.size and (index.dtype.kind not in "iu" or index.min() < 0)):
        raise ConfigError(f"indices: need a list of integers >= 0, got {index.dtype} of shape {index.shape}")
    return index.astype(np.uint64)


_PIXELS_AT_ONCE = 1 << 16  # of one sampling call: its buffers then stay in the processor's cache


def render(
    seed: int,
    indices: ArrayLike,
    *,
    image_size: int,
    classes: Sequence[str],
    diameter: tuple[float, float],
    label: str | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images `indices` of the data set `seed`; the other arguments and errors are those of `attributes`.

    Args:
        label: Draw every ball as one of this class, at its place, size and rotation: the counterfactual that
            explanations of an image can be held against; None: as the class that it has.

    Returns:
        images (n, image_size, image_size, 3) uint8 RGB and labels (n,) int64. An image depends on the seed, its
        index and the keyword arguments alone.
    """
    drawn = attributes(seed, indices, image_size=image_size, classes=classes, diameter=diameter)
    if label is not None:
        if label not in classes:
            raise ConfigError(f"label: {label!r} is none of {', '.join(classes)}")
        drawn = replace(drawn, label=np.full_like(drawn.label, list(classes).index(label)))
    images = np.full((len(drawn.label), image_size, image_size, 3), 255, np.uint8)
    bucket = np.searchsorted(BUCKETS, drawn.diameter)
    group = bucket * len(classes) + drawn.label
    order = np.argsort(group, kind="stable")
    bounds = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
    for start, stop in pairwise(bounds):
        first = order[start]
        side = min(int(np.ceil(BUCKETS[bucket[first]])) + MARGIN, image_size)
        step = max(1, _PIXELS_AT_ONCE // side**2)
        name, level = classes[drawn.label[first]], int(bucket[first])
        for s in range(start, stop, step):
            _draw(images, order[s : min(s + step, stop)], drawn, name, level, side)
    return images, drawn.label


@cache
def _cosines() -> tuple[Array, Array]:
    angle = np.arange(_TURN) * (2 * np.pi / _TURN)
    return np.cos(angle), np.sin(angle)


def _draw(
    images: NDArray[np.uint8], rows: NDArray[np.intp], drawn: Attributes, name: str, bucket: int, side: int
) -> None:
    """Draw the balls of `images[rows]`, all of one class and size bucket, in patches of `side` pixels."""
    import torch

    pattern = texture(name, bucket)
    gain = 2 * BUCKETS[bucket] * TEXELS / ((texture_side(bucket) - 1) * drawn.diameter[rows])
    turn = np.rint(drawn.rotation[rows] * (_TURN / (2 * np.pi))).astype(np.int64)
    cos, sin = (gain * table[turn] for table in _cosines())
    left, top = (
        np.rint(c[rows] - side / 2).astype(np.int64).clip(0, images.shape[1] - side) for c in (drawn.x, drawn.y)
    )
    # Texture place of a pixel: its offset (dx, dy) from the centre, rotated and scaled. Kept as a complex number
    # it is a sum of a term of its column and a term of its row.
    pixel = np.arange(side) + 0.5
    dx = (left - drawn.x[rows])[:, None] + pixel
    dy = (top - drawn.y[rows])[:, None] + pixel
    column, row = np.empty((2, len(rows), side), np.complex64)
    column.real, column.imag = cos[:, None] * dx, sin[:, None] * dx
    row.real, row.imag = -sin[:, None] * dy, cos[:, None] * dy
    grid = torch.view_as_real(torch.from_numpy(column)[:, None, :] + torch.from_numpy(row)[:, :, None])
    patch = torch.nn.functional.grid_sample(
        pattern.expand(len(rows), -1, -1, -1), grid, padding_mode="border", align_corners=True
    )
    windows = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(1, 2), writeable=True)
    windows[rows, top, left] = patch.to(torch.uint8).numpy()


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
        image_size, classes, diameter, seed: see `nrcg.data.sportballs.attributes`.
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
    attributes(seed, [], image_size=image_size, classes=classes, diameter=diameter)  # checks
    with new_dataset(
        folder,
        name=name,
        source="drawn by nrcg.sportballs",
        classes=classes,
        image_shape=(image_size, image_size, 3),
        num_images={"train": num_train, "val": num_val},
        generation={"seed": seed, **drawing, **counts},
    ) as writers:
        size = max(1, PIECE_BYTES // (3 * image_size**2))

        def draw(piece: tuple[str, int, int]) -> tuple[str, int, NDArray[np.uint8], NDArray[np.int64]]:
            split, start, stop = piece
            offset = num_train if split == "val" else 0
            images, labels = render(
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
