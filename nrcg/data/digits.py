"""The handwritten digits that come with scikit-learn: real images, ten classes, nothing to download.

The test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
1998: 1,797 images of 8 x 8 pixels in 17 grey levels, ink high.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from nrcg.data.sources import Bytes, Listing, Split, file_line, file_split, mixed_order, split_off
from nrcg.errors import DataError

LEVELS = 16
"""The highest grey level: white ink on a black ground here."""


def list_digits(*, val_share: float, seed: int) -> Listing:
    """The digits as image files in memory, split class by class.

    Args:
        val_share: Share of each digit that validates.
        seed: Of the images' order and of the split.

    Raises:
        DataError: scikit-learn is missing.
    """
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("source digits needs scikit-learn: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / LEVELS)).astype(np.uint8)
    labels = labels.astype(np.int64)
    order = mixed_order(map(str, range(len(images))), seed)
    val = split_off(labels[order], val_share)
    path = Path(sklearn.__file__).parent / "datasets" / "data" / "digits.csv.gz"
    splits = {"train": _split(images, labels, order[~val]), "val": _split(images, labels, order[val])}
    return Listing(path, splits, f"scikit-learn {sklearn.__version__}, load_digits", [file_line(path, path.name)])


def _split(images: np.ndarray, labels: np.ndarray, members: np.ndarray) -> Split:
    return file_split([_png(images[i]) for i in members], [f"digit {i}" for i in members], labels[members])


def _png(image: np.ndarray) -> Bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return Bytes(buffer.getvalue())
