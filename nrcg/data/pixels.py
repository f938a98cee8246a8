"""From an encoded image file to a square of uint8 RGB pixels, by Pillow."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from nrcg.config import PREPROCESSING
from nrcg.errors import DataError

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""


class UnreadableImage(DataError):
    """An image file that is cut off, no image, or of a kind that has no RGB pixels; the message says why."""


def decode(data: bytes, *, size: int | None, preprocessing: str) -> NDArray[np.uint8]:
    """The pixels of an image file.

    The EXIF orientation is applied. Grey images get three equal channels, 16 bits become 8 by x / 257, palettes are
    looked up, transparent pixels are laid on white, and of several frames the first is taken. The resizing filter is
    Pillow's bilinear one with antialiasing, that of torchvision's `Resize` on Pillow images.

    Args:
        data: the file's bytes, in any format that Pillow reads.
        size: side of the result in pixels; None keeps the image's own height and width.
        preprocessing: squash resizes both sides to `size`; center_crop first cuts out the largest centred square.

    Returns:
        (size, size, 3) uint8 RGB, (H, W, 3) without a size.

    Raises:
        UnreadableImage: there is no image in these bytes.
    """
    if preprocessing not in PREPROCESSING:
        raise ValueError(f"preprocessing must be one of {PREPROCESSING}, got {preprocessing!r}")
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = _rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError:
        raise UnreadableImage("empty" if not data else "no image that Pillow knows") from None
    except UnreadableImage:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise all kinds of errors
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from error
    if preprocessing == "center_crop":
        side = min(image.size)
        # Rounded as torchvision's CenterCrop does.
        left, top = (round((length - side) / 2.0) for length in image.size)
        box = (left, top, left + side, top + side)
        image = image.crop(box)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 1 or 3) uint8 pixels as (size, size, 1 or 3), by the filter of `decode`."""
    if pixels.shape[:2] == (size, size):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise UnreadableImage(f"grey levels from {levels.min()} to {levels.max()}, more than 16 bits hold")
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))  # rounded
    if image.mode == "F":
        raise UnreadableImage("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")
