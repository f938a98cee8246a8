"""Feature extractors: uint8 images in, one feature vector per image out.

Two ship: clean-fid's Inception network, the only one whose distances may be called FID and KID, and the
penultimate layer of the judge classifier, which needs no download. Anything else that satisfies `Extractor`
works too.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nrcg.errors import DataError

if TYPE_CHECKING:
    import torch

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
# clean-fid states no digest; this one is k-diffusion's (evaluation.py), for the file at the same address.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Extractor(Protocol):
    """What `extract` needs. `name` goes into the metrics' names; "inception" alone makes them FID and KID."""

    name: str
    dim: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W, C) uint8 images -> (n, dim) float32 features; row i depends on image i alone."""
        ...


def extract(
    extractor: Extractor,
    images: np.ndarray,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of all images, batch by batch, so that a memory-mapped array is never read whole.

    images: (N, H, W, C) uint8, C = 1 or 3. progress: called as progress(images done, N) after each batch.
    Returns (N, extractor.dim) float32. Raises DataError for other arrays and for features that are not
    finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_images(images)
    features = np.empty((len(images), extractor.dim), dtype=np.float32)
    for start in range(0, len(images), batch_size):
        batch = np.ascontiguousarray(images[start : start + batch_size])
        rows = extractor(batch)
        if rows.shape != (len(batch), extractor.dim):
            raise ValueError(
                f"extractor {extractor.name!r} returned shape {rows.shape}, expected {(len(batch), extractor.dim)}"
            )
        if not np.isfinite(rows).all():
            raise DataError(
                f"extractor {extractor.name!r}: features of images {start} to {start + len(batch) - 1} "
                "are not all finite"
            )
        features[start : start + len(batch)] = rows
        if progress is not None:
            progress(start + len(batch), len(images))
    return features


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise DataError(f"images must be (N, H, W, 1 or 3) uint8, got shape {images.shape} and type {images.dtype}")


def find_inception(weights_dir: str | Path) -> Path | None:
    """Path of clean-fid's Inception file in `weights_dir`, or None. No other place is tried."""
    path = Path(weights_dir) / INCEPTION_FILE
    return path if path.is_file() else None


def resolve_features(features: str, weights_dir: str | Path) -> str:
    """`inception` or `judge`; `auto` is Inception where its weights are at hand."""
    if features != "auto":
        return features
    return "judge" if find_inception(weights_dir) is None else "inception"


class InceptionExtractor:
    """clean-fid's Inception-v3 pool features in its "clean" mode (Parmar et al. 2022, arXiv 2104.11222).

    Each channel is resized to 299 x 299 by PIL's antialiased bicubic filter in float32, without quantising,
    then runs through the TorchScript network of StyleGAN2-ADA: what
    `cleanfid.features.build_feature_extractor("clean")` does, but that function always downloads into the
    system's temporary folder. Grey images are repeated to three channels.

    weights_dir: folder that holds `inception-2015-12-05.pt`. download: fetch the file into `weights_dir` if
    it is not there. sha256: the digest the file must have, since loading TorchScript executes code from the
    file; None loads any file. The attribute `sha256` is the digest of the file used, to be recorded beside
    the result.

    Raises DataError if the file is missing, has another digest, cannot be loaded or cannot be downloaded.
    """

    name = "inception"
    dim = 2048

    def __init__(
        self,
        weights_dir: str | Path,
        device: "str | torch.device" = "cpu",
        *,
        download: bool = False,
        sha256: str | None = INCEPTION_SHA256,
    ) -> None:
        import torch
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        path = find_inception(weights_dir)
        if path is None and download:
            path = _download_inception(Path(weights_dir), sha256)
        if path is None:
            raise DataError(
                f"{INCEPTION_FILE} is missing: download {INCEPTION_URL} and put it into {Path(weights_dir)}"
            )
        self.sha256 = _check_digest(path, sha256)
        self.device = torch.device(device)
        try:
            with warnings.catch_warnings():
                # torch deprecates TorchScript, the only format this network comes in.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                model = InceptionV3W(str(path.parent), download=False, resize_inside=False)
        except (RuntimeError, AttributeError) as error:
            # AttributeError: a TorchScript file without the submodule `layers` that clean-fid calls.
            raise DataError(f"{path} is no Inception network: {str(error).strip().splitlines()[0]}") from error
        self._model = model.to(self.device).eval()
        self._resize = build_resizer("clean")
        self._workers = min(8, os.cpu_count() or 1)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W, 1 or 3) uint8 -> (n, 2048) float32."""
        import torch

        _check_images(images)
        if len(images) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        if images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        # PIL releases the interpreter's lock while it resizes, which takes longer than the network on a GPU.
        with ThreadPoolExecutor(self._workers) as pool:
            resized = np.stack(list(pool.map(self._resize, images)))
        with torch.no_grad():
            x = torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(self.device)
            return self._model(x).float().cpu().numpy()


class JudgeExtractor:
    """Penultimate features of the judge classifier; its Fréchet distance is `fd_judge`, never FID.

    classifier: an nn.Module with `features(x)`, (B, C, H, W) in [-1, 1] -> (B, D), and `feature_dim`, which
    is D. It is put into eval mode and stays on its own device; the images must have the channels and size
    that it takes.
    """

    def __init__(self, classifier: "torch.nn.Module", name: str = "judge") -> None:
        self.name = name
        self.dim = int(classifier.feature_dim)
        self._classifier = classifier

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W, C) uint8 -> (n, dim) float32."""
        import torch

        _check_images(images)
        if len(images) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        parameter = next(self._classifier.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        self._classifier.eval()
        with torch.no_grad():
            # A copy: torch warns about arrays that it may not write to, as memory-mapped ones are.
            x = torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self._classifier.features(x).float().cpu().numpy()


def _check_digest(path: Path, expected: str | None) -> str:
    """SHA-256 of the file, in hexadecimal. Raises DataError if `expected` is given and differs."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and digest != expected.lower():
        raise DataError(f"{path} is damaged or another file: sha256 {digest}, expected {expected.lower()}")
    return digest


def _download_inception(weights_dir: Path, sha256: str | None) -> Path:
    """clean-fid's own download, into a scratch folder first: a cut connection must not leave half a file."""
    from cleanfid.downloads_helper import check_download_inception

    try:
        weights_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=weights_dir) as scratch:
            part = Path(check_download_inception(fpath=scratch))
            _check_digest(part, sha256)
            part.replace(weights_dir / INCEPTION_FILE)
    except OSError as error:
        raise DataError(
            f"cannot download {INCEPTION_URL} into {weights_dir} ({error}): put it there by hand"
        ) from error
    return weights_dir / INCEPTION_FILE
