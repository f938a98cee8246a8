"""Reference images as one extractor sees them: statistics over all, features and neighbours of the first ones.

Everything that is the same for many sets of samples is computed once, from one pass over the images in blocks, and kept
in a cache file under a key of data, preprocessing and weights, so that a stale file is never read.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg.errors import DataError
from nrcg.evaluation.features import Extractor, extract
from nrcg.evaluation.frechet import FeatureStatistics, covariance_factor
from nrcg.evaluation.pairwise import Within, fixed_choice, mean_pair_distance, smallest_keys, within
from nrcg.files import atomic_save_arrays

CACHE_VERSION = 2
_IMAGES = 2048  # images extracted at a time


@dataclass(frozen=True)
class ReferenceSet:
    """One set of real images.

    statistics: of all n. factor: `covariance_factor` of their covariance. features: (min(n, num_pairwise), dim) float32
    of some, for the pairwise metrics. pairs: what these say among themselves.
    """

    statistics: FeatureStatistics
    factor: np.ndarray
    features: np.ndarray
    pairs: Within

    @classmethod
    def make(cls, statistics: FeatureStatistics, features: np.ndarray, device: str | torch.device) -> ReferenceSet:
        return cls(statistics, covariance_factor(statistics.cov), features, within(features, device=device))


@dataclass(frozen=True)
class Reference:
    """What samples are compared with under one protocol.

    name: the extractor's. protocol: its preprocessing and weights in words. images: which images, in words.
    everything: all of them. target: those of the target class, or None. distance: mean pairwise distance of real images
    of the target class that the others were not taken from where there are such, of `everything` without a target.
    num_pairwise: samples that are compared in pairs; None: all.
    """

    name: str
    protocol: str
    images: str
    everything: ReferenceSet
    target: ReferenceSet | None
    distance: float
    num_pairwise: int | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for two metrics to be comparable."""
        sizes = f"{self.everything.statistics.n} images"
        if self.target is not None:
            sizes += f", {self.target.statistics.n} of the target class"
        return {
            "protocol": f"{self.name}: {self.protocol}",
            "reference": f"{self.images}; {sizes}; {len(self.everything.features)} compared in pairs",
        }


def make_reference(
    extractor: Extractor,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    target: int | None = None,
    *,
    held_out: np.ndarray | None = None,
    num_pairwise: int | None = 10_000,
    described: str = "images",
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """A reference from images, read in blocks; none is drawn twice.

    images: (N, H, W, C) uint8. labels: (N,), needed for a target. held_out: (M, H, W, C) uint8, real images of the
    target class that diversity is held against; without them the reference's own. num_pairwise: images of each set
    that are compared in pairs, a fixed random choice; None: all. described: which images, for `Reference.images`.

    Raises DataError if the target class has fewer than 2 images.
    """
    if target is not None and (labels is None or np.shape(labels) != (len(images),)):
        raise ValueError(f"{len(images)} images need as many labels to take those of the class {target} from")
    collected = ReferenceCollector(extractor, target, num_pairwise)
    for start in range(0, len(images), _IMAGES):
        features = extract(extractor, images[start : start + _IMAGES])
        collected.add(features, None if labels is None else np.asarray(labels[start : start + _IMAGES]))
        if progress is not None:
            progress(start + len(features), len(images))
    apart = None
    if held_out is not None and len(held_out) > 1:
        apart = extract(extractor, held_out[fixed_choice(len(held_out), num_pairwise)])
    return collected.finish(described=described, held_out=apart, device=device)


class ReferenceCollector:
    """A reference from the features of its images, given piece by piece.

    extractor: its name, dim and protocol; not called. target, num_pairwise: as for `make_reference`.
    """

    def __init__(self, extractor: Extractor, target: int | None = None, num_pairwise: int | None = None) -> None:
        self.name, self.protocol = extractor.name, getattr(extractor, "protocol", "unknown")
        self.target, self.num_pairwise = target, num_pairwise
        self._parts = [_Collected(extractor.dim, num_pairwise) for _ in range(1 if target is None else 2)]

    def add(self, features: np.ndarray, labels: np.ndarray | None = None) -> None:
        """(n, dim) features of the next images and, for a target, their (n,) labels."""
        self._parts[0].add(features)
        if self.target is not None:
            self._parts[1].add(features[labels == self.target])

    def finish(
        self, *, described: str = "images", held_out: np.ndarray | None = None, device: str | torch.device = "cpu"
    ) -> Reference:
        """The reference. held_out: (M, dim) features. Raises DataError if a set has fewer than 2 images."""
        if self.target is not None and self._parts[1].statistics.n < 2:
            raise DataError(
                f"the reference set has {self._parts[1].statistics.n or 'no'} image of the target class {self.target}; "
                "2 or more are needed"
            )
        sets = [ReferenceSet.make(part.statistics, part.features, device) for part in self._parts]
        pairs = sets[-1].pairs if held_out is None else within(held_out, device=device)
        return Reference(
            name=self.name,
            protocol=self.protocol,
            images=described,
            everything=sets[0],
            target=sets[1] if self.target is not None else None,
            distance=mean_pair_distance(pairs).value,
            num_pairwise=self.num_pairwise,
        )


class _Collected:
    """Statistics of all features added, and some of them, `most` or all: those of `fixed_choice`, whose number of rows
    is not known before."""

    def __init__(self, dim: int, most: int | None) -> None:
        self.statistics, self.most = FeatureStatistics(dim), most
        self._keys, self._random = np.empty(0), np.random.default_rng(0)
        self._kept: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        self.statistics.update(features)
        self._keys = np.concatenate([self._keys, self._random.random(len(features))])
        self._kept.append(features)
        if self.most is not None and len(self._keys) > 2 * self.most:
            self._choose()

    def _choose(self) -> None:
        chosen = smallest_keys(self._keys, self.most)
        self._keys, self._kept = self._keys[chosen], [np.concatenate(self._kept)[chosen]]

    @property
    def features(self) -> np.ndarray:
        self._choose()
        return self._kept[0]


def cached_reference(folder: str | Path, key: Mapping[str, object], make: Callable[[], Reference]) -> Reference:
    """The reference of a key, read from `folder` or made and kept there.

    key: everything that decides the result: checksums of the data, protocol, counts. A file is written whole and then
    moved, so two processes that make the same one at a time do no harm. A damaged file is made anew.
    """
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    path = Path(folder) / f"{key['name']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    try:
        return load_reference(path)
    except (FileNotFoundError, DataError):
        reference = make()
        save_reference(path, reference)
        return reference


def save_reference(path: str | Path, reference: Reference) -> None:
    """Write a reference as one .npz of plain arrays, whole or not at all."""
    path = Path(path)
    words = {name: getattr(reference, name) for name in ("name", "protocol", "images", "num_pairwise")}
    arrays = {"words": np.array(json.dumps(words)), "distance": np.float64(reference.distance)}
    for part, one in (("everything", reference.everything), ("target", reference.target)):
        if one is not None:
            arrays |= {
                f"{part}.n": np.int64(one.statistics.n),
                f"{part}.mean": one.statistics.mean,
                f"{part}.scatter": one.statistics.scatter,
                f"{part}.factor": one.factor,
                f"{part}.features": one.features,
                f"{part}.nearest": one.pairs.nearest,
                f"{part}.kernel": one.pairs.kernel,
                f"{part}.distance": one.pairs.distance,
            }
    atomic_save_arrays(path, arrays)


def load_reference(path: str | Path) -> Reference:
    """Read what `save_reference` wrote. Raises FileNotFoundError, and DataError for any other file."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            words = json.loads(str(arrays["words"]))
            sets = {part: _read_set(arrays, part) for part in ("everything", "target") if f"{part}.n" in arrays.files}
            return Reference(
                name=words["name"],
                protocol=words["protocol"],
                images=words["images"],
                everything=sets["everything"],
                target=sets.get("target"),
                distance=float(arrays["distance"]),
                num_pairwise=words["num_pairwise"],
            )
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no reference ({error}); delete it") from None


def _read_set(arrays: np.lib.npyio.NpzFile, part: str) -> ReferenceSet:
    statistics = FeatureStatistics(arrays[f"{part}.mean"].shape[0])
    statistics.n = int(arrays[f"{part}.n"])
    statistics.centre, statistics.scatter = arrays[f"{part}.mean"], arrays[f"{part}.scatter"]
    pairs = Within(*(arrays[f"{part}.{name}"] for name in ("nearest", "kernel", "distance")))
    return ReferenceSet(statistics, arrays[f"{part}.factor"], arrays[f"{part}.features"], pairs)
