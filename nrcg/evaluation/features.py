"""Feature extractors: uint8 images in, one feature vector per image out.

Each is one protocol: a network with its weights, its resizing and its value range. Numbers of different protocols are
never comparable. Three ship: clean-fid's Inception (`fid`), torcheval's, which the paper used (`fid_torcheval`), and
the penultimate layer of the judge classifier, which needs no download. A SPEC of `nrcg.specs` gives any other
network, and anything else that satisfies `Extractor` works too.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nrcg.errors import DataError
from nrcg.files import sha256_file, temporary_name

if TYPE_CHECKING:
    import torch


INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"


# clean-fid states no digest; this one is k-diffusion's (evaluation.py), for the file at the same address.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
TORCHEVAL_FILE = "inception_v3_google-0cc3c7bd.pth"
TORCHEVAL_URL = f"https://download.pytorch.org/models/{TORCHEVAL_FILE}"


# torchvision names its files after the first 8 hex digits of their SHA-256 and checks these.
TORCHEVAL_SHA256 = "0cc3c7bd"


class Extractor(Protocol):
    """What `extract` needs.

    name: goes into the metrics' names; only "inception" and "torcheval" make them FID and KID. protocol:
    preprocessing and weights in words; two extractors of one name and protocol give equal features.
    """

    name: str
    dim: int
    protocol: str

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


def resolve_features(features: str | Sequence[str], weights_dir: str | Path) -> list[str]:
    """The protocols to evaluate by, the headline first: inception, else torcheval, else the first given.

    `auto` stands for `inception` and `torcheval` where their weights lie in `weights_dir`, and `judge`.
    """
    found: list[str] = []
    for name in [features] if isinstance(features, str) else features:
        if name == "auto":
            files = {"inception": INCEPTION_FILE, "torcheval": TORCHEVAL_FILE}
            found += [protocol for protocol, file in files.items() if (Path(weights_dir) / file).is_file()]
            found.append("judge")
        else:
            found.append(name)
    first = ["inception", "torcheval"]
    return sorted(dict.fromkeys(found), key=lambda name: first.index(name) if name in first else len(first))


def extractor_name(spec: str) -> str:
    """The name in column names: `judge` for "judge", `timm_vit_tiny_patch16_224` for "timm:vit_tiny_patch16_224"."""
    return re.sub(r"[^a-z0-9]+", "_", spec.lower()).strip("_")


def load_extractor(
    spec: str, *, weights_dir: str | Path, judge: torch.nn.Module | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """`inception`, `torcheval`, `judge`, or the SPEC of a network of `nrcg.specs` (its penultimate features).

    Inception's weights are looked up in `weights_dir`, then downloaded into it. Raises DataError where they cannot be
    had.
    """
    if spec == "inception":
        return InceptionExtractor(weights_dir, device, download=True)
    if spec == "torcheval":
        return TorchevalExtractor(weights_dir, device, download=True)
    if spec == "judge":
        if judge is None:
            raise DataError("features of the judge need a judge: give its folder")
        return ClassifierExtractor(judge)
    from nrcg.classifiers.specs import load_classifier

    return ClassifierExtractor(load_classifier(spec).to(device), extractor_name(spec), repeat_grey=True)


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
        device: str | torch.device = "cpu",
        *,
        download: bool = False,
        sha256: str | None = INCEPTION_SHA256,
    ) -> None:
        import torch
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        path = _find_weights(weights_dir, INCEPTION_FILE, INCEPTION_URL, sha256, download)
        self.sha256 = _check_digest(path, sha256)
        self.protocol = f"clean-fid, PIL bicubic antialiased to 299 in float32, TorchScript {self.sha256[:12]}"
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

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W, 1 or 3) uint8 -> (n, 2048) float32."""
        import torch

        _check_images(images)
        if len(images) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        if images.shape[3] == 1:
            images = np.repeat(images, 3, axis=3)
        # PIL releases the interpreter's lock while it resizes, which takes longer than the network on a GPU.
        with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            resized = np.stack(list(pool.map(self._resize, images)))
        with torch.no_grad():
            x = torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(self.device)
            return self._model(x).float().cpu().numpy()


class TorchevalExtractor:
    """torcheval's FrechetInceptionDistance, the published protocol: torchvision's Inception v3 before its classifier.

    Images in [0, 1] are resized to 299 x 299 (bilinear, align_corners false, no antialiasing) and go through
    `torchvision.models.inception_v3` with its ImageNet weights, in float32; torchvision then takes its inputs to lie in
    [0, 1] with ImageNet's mean and deviation and re-normalises them (`transform_input`), although nothing subtracted
    these before: part of the protocol, and kept. torcheval 0.0.7, metrics/image/fid.py.

    Arguments and errors as `InceptionExtractor`; the file is `inception_v3_google-0cc3c7bd.pth`, and sha256 may be the
    digest's first digits.
    """

    name = "torcheval"
    dim = 2048

    def __init__(
        self,
        weights_dir: str | Path,
        device: str | torch.device = "cpu",
        *,
        download: bool = False,
        sha256: str | None = TORCHEVAL_SHA256,
    ) -> None:
        import pickle

        import torch
        from torchvision.models import inception_v3

        path = _find_weights(weights_dir, TORCHEVAL_FILE, TORCHEVAL_URL, sha256, download)
        self.sha256 = _check_digest(path, sha256)
        self.protocol = f"torcheval, [0, 1], bilinear to 299, torchvision Inception v3 {self.sha256[:12]}"
        self.device = torch.device(device)
        model = inception_v3(weights=None, transform_input=True, init_weights=False)
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, EOFError, TypeError, AttributeError, pickle.UnpicklingError) as error:
            raise DataError(f"{path} is no Inception network: {str(error).strip().splitlines()[0]}") from error
        model.fc = torch.nn.Identity()
        self._model = model.to(self.device).eval()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W, 1 or 3) uint8 -> (n, 2048) float32."""
        import torch
        from torch.nn.functional import interpolate

        _check_images(images)
        if len(images) == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        with torch.no_grad():
            x = _channels_first(images, repeat_grey=True).to(self.device).float() / 255
            x = interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            return self._model(x).float().cpu().numpy()


class ClassifierExtractor:
    """Penultimate features of a classifier, the judge or any other; the Fréchet distance is `fd_<name>`, never FID.

    classifier: an nn.Module with `features(x)`, (B, C, H, W) in [-1, 1] -> (B, D), and `feature_dim`, which
    is D. It is put into eval mode and stays on its own device; the images must have the channels that it takes, except
    that repeat_grey makes three of one.
    """

    def __init__(self, classifier: torch.nn.Module, name: str = "judge", *, repeat_grey: bool = False) -> None:
        self.name = name
        self.dim = int(classifier.feature_dim)
        self.repeat_grey = repeat_grey
        self.channels: int | None = getattr(classifier, "channels", None)
        size = getattr(classifier, "image_size", None)
        resized = f", resized to {size}" if size else ""
        self.protocol = f"penultimate features, [-1, 1]{resized}, weights {weights_digest(classifier)[:12]}"
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
            x = _channels_first(images, self.repeat_grey).to(device).float() / 127.5 - 1
            return self._classifier.features(x).float().cpu().numpy()


def _channels_first(images: np.ndarray, repeat_grey: bool) -> torch.Tensor:
    """(n, H, W, C) to (n, C, H, W), uint8."""
    import torch

    # A copy: torch warns about arrays that it may not write to, as memory-mapped ones are.
    x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
    return x.expand(-1, 3, -1, -1) if repeat_grey and x.shape[1] == 1 else x


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        values = value.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name} {values.shape} {value.dtype}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _check_digest(path: Path, expected: str | None) -> str:
    """SHA-256 of the file, in hexadecimal. Raises DataError if `expected`, its first digits, is given and differs."""
    digest = sha256_file(path)
    if expected is not None and not digest.startswith(expected.lower()):
        raise DataError(f"{path} is damaged or another file: sha256 {digest}, expected {expected.lower()}")
    return digest


def _find_weights(weights_dir: str | Path, file: str, url: str, sha256: str | None, download: bool) -> Path:
    """The file in `weights_dir`, downloaded if asked for. Raises DataError where it cannot be had."""
    path = Path(weights_dir) / file
    if path.is_file():
        return path
    if not download:
        raise DataError(f"{file} is missing: download {url} and put it into {path.parent}")
    part = temporary_name(path)  # beside the file: a cut connection must not leave half of it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as out:
            shutil.copyfileobj(answer, out)
        _check_digest(part, sha256)
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url} into {path.parent} ({error}): put it there by hand") from error
    finally:
        part.unlink(missing_ok=True)
    return path
