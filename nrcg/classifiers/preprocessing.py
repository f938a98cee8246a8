"""How images become what a network was trained on: resizing, and what the libraries' own transforms ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nrcg.errors import DataError

MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Interpolations that have a gradient, and torch's name of each."""
BLACK = -1.0
PIL_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
KNOWN_FLAGS = {
    "do_convert_rgb",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_flip_channel_order",
    "do_reduce_labels",
}


@dataclass(frozen=True)
class Resizing:
    """Resizing, antialiased, and then a cut of the middle; differentiable.

    Args:
        size: Of the shorter side, which keeps the aspect ratio, or (height, width).
        crop: Side of the square that is cut out of the middle, black where there is nothing; None: no cut.
        interpolation: nearest, bilinear or bicubic.
        crop_rounds: A middle between two pixels goes to the even one (torchvision, timm), or down (transformers).

    Raises:
        ValueError: The interpolation is unknown.
    """

    size: int | tuple[int, int]
    crop: int | None = None
    interpolation: str = "bilinear"
    crop_rounds: bool = True

    def __post_init__(self) -> None:
        if self.interpolation not in MODES:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; allowed: {', '.join(MODES)}")

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], resized."""
        size = self._target(*x.shape[-2:])
        if size != tuple(x.shape[-2:]):
            x = F.interpolate(
                x, size=size, mode=MODES[self.interpolation], antialias=self.interpolation in ("bilinear", "bicubic")
            )
        if self.crop is None:
            return x
        missing = [max(self.crop - side, 0) for side in size]
        if any(missing):
            high, wide = missing
            x = F.pad(x, (wide // 2, (wide + 1) // 2, high // 2, (high + 1) // 2), value=BLACK)
        top, left = (self._start(side) for side in x.shape[-2:])
        return x[..., top : top + self.crop, left : left + self.crop]

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return int(self.size[0]), int(self.size[1])
        longer = int(self.size * max(height, width) / min(height, width))
        return (self.size, longer) if height <= width else (longer, self.size)

    def _start(self, side: int) -> int:
        half = (side - self.crop) / 2
        return round(half) if self.crop_rounds else math.floor(half)


def of_torchvision(seen: Any) -> dict[str, Any]:
    """Settings of the adapter that do what the transforms of torchvision's weights do."""
    resizing = _resizing(seen.resize_size[0], seen.crop_size[0], seen.interpolation.value)
    return {"image_size": seen.crop_size[0], "resizing": resizing, "mean": seen.mean, "std": seen.std}


def of_timm(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the adapter that do what timm's transforms of a model's data configuration do in evaluation."""
    height, width = seen["input_size"][-2:]
    if height != width:
        raise DataError(f"it takes images of {height} x {width} pixels, which are not square")
    if seen["crop_mode"] not in ("center", "squash"):
        raise DataError(f"its crop_mode {seen['crop_mode']!r} is unknown; allowed: center, squash")
    side = math.floor(height / seen["crop_pct"])
    size = side if seen["crop_mode"] == "center" else (side, side)
    resizing = _resizing(size, height, seen["interpolation"])
    return {"image_size": height, "resizing": resizing, "mean": seen["mean"], "std": seen["std"]}


def of_processor(processor: Any, channels: int | None) -> dict[str, Any]:
    """Settings of the adapter that do what an image processor of transformers does; `check_like` shows whether they do.

    Raises:
        DataError: It asks for what the adapter cannot do, which is named.
    """
    seen, kind = processor.to_dict(), type(processor).__name__
    asked = [flag for flag, value in seen.items() if flag.startswith("do_") and value is True]
    if unknown := sorted(set(asked) - KNOWN_FLAGS):
        raise DataError(f"its {kind} asks for {', '.join(unknown)}, which has no gradient here")
    factor = seen["rescale_factor"] if seen.get("do_rescale") else 1.0
    offset = -1.0 if seen.get("do_rescale") and seen.get("rescale_offset") else 0.0
    known: dict[str, Any] = {"channels": channels, "input_range": (offset, 255.0 * factor + offset)}
    if seen.get("do_normalize"):
        known |= {"mean": seen["image_mean"], "std": seen["image_std"]}
    if seen.get("include_top"):  # EfficientNet's: divided by std once more
        std = known.get("std") or [1.0] * len(seen["image_std"])
        known["std"] = [value * again for value, again in zip(std, seen["image_std"], strict=True)]
    if seen.get("do_flip_channel_order"):
        known["channel_order"] = "bgr"
    return known | _sides(seen, kind)


def _sides(seen: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """image_size and resizing of an image processor."""
    crop = _side(seen.get("crop_size"), kind) if seen.get("do_center_crop") else None
    if not seen.get("do_resize"):
        if crop is not None:
            raise DataError(f"its {kind} crops images that it does not resize; give size=N")
        return {}
    size = seen["size"]
    edge = size.get("shortest_edge")
    wanted: int | tuple[int, int] = edge if edge is not None else (size.get("height"), size.get("width"))
    if size.get("longest_edge") or wanted == (None, None):
        raise DataError(f"its {kind} asks for size {dict(size)}, which is unknown here")
    if edge is not None and kind.startswith("ConvNext"):
        crop, wanted = (edge, int(edge / seen["crop_pct"])) if edge < 384 else (crop, (edge, edge))
    elif edge is not None and seen.get("crop_pct"):
        wanted = int(edge / seen["crop_pct"])
    elif edge is not None and kind.startswith("Levit"):
        wanted = int((256 / 224) * edge)
    mode = PIL_MODES.get(int(seen["resample"]), f"resample {seen['resample']}")
    square = crop or (wanted[0] if isinstance(wanted, tuple) and wanted[0] == wanted[1] else None)
    return {"image_size": square, "resizing": _resizing(wanted, crop, mode, crop_rounds=False)}


def _side(size: Any, kind: str) -> int:
    sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
    if len(sides) != 1 or None in sides:
        raise DataError(f"its {kind} cuts out {size}, which is no square")
    return sides.pop()


def _resizing(
    size: int | tuple[int, int], crop: int | None, interpolation: str, *, crop_rounds: bool = True
) -> Resizing:
    try:
        return Resizing(size, crop, interpolation, crop_rounds)
    except ValueError as error:
        raise DataError(f"its own preprocessing cannot be done: {error}") from error


def check_like(processor: Any, prepare: Any, channels: int) -> None:
    """Refuse an adapter that makes of an image something else than the processor does.

    Args:
        processor: An image processor of transformers.
        prepare: The adapter's preparation: images in [-1, 1] to the network's input.
        channels: C.

    Raises:
        DataError: It does, or the processor gives no pixel values; its kind is named.
    """
    kind = type(processor).__name__
    image = torch.rand(channels, 45, 60, generator=torch.Generator().manual_seed(0))
    try:
        wanted = processor(image * 255, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    except Exception as error:  # of whichever library does it
        raise DataError(f"its {kind} cannot be tried ({type(error).__name__})") from error
    found = prepare(image[None] * 2 - 1)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=1e-4):
        raise DataError(
            f"its {kind} prepares images in a way that is unknown here; give what the network expects by"
            " nrcg.Classifier(module, ...)"
        )
