"""What an explanation of some images is: the images before and after, and what the classifier says of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import nn

from nrcg.classifiers.logits import predict, two_sided
from nrcg.devices import frozen


@dataclass(frozen=True)
class Explanations:
    """N explanations.

    Attributes:
        originals: (N, H, W, C) uint8, x*.
        images: (N, H, W, C) uint8, the explanations; the original itself where it was skipped.
        starts: (N, H, W, C) uint8, what was changed: the originals, or for `affirmative` their counterfactuals.
        targets: (N,) int64, the class aimed at.
        before: (N, K) float32, the guide's probabilities of the originals.
        after: (N, K) float32, of the explanations as they are stored, in 8 bits.
        tau: (N,) float64, share of the steps that the image was noised by; 0 where nothing was.
        weight: (N,) float64, lambda.
        skipped: (N,) bool, the guide called the original the target already, where the kind needs another class.
        nonfinite: (N,) bool, the trajectory turned non-finite and stands as it was before.
        seconds: (N,) float64, wall time of making each.
        classes: Names of the K classes, or None.
        kind: One of KINDS, or what made them otherwise.
    """

    originals: np.ndarray
    images: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    before: np.ndarray
    after: np.ndarray
    tau: np.ndarray
    weight: np.ndarray
    skipped: np.ndarray
    nonfinite: np.ndarray
    seconds: np.ndarray
    classes: list[str] | None = None
    kind: str = "counterfactual"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def own(self) -> np.ndarray:
        """(N,) int64, the class that the guide gave the originals."""
        return self.before.argmax(axis=1)

    @property
    def found(self) -> np.ndarray:
        """(N,) int64, the class that the guide gives the explanations."""
        return self.after.argmax(axis=1)

    @property
    def succeeded(self) -> np.ndarray:
        """(N,) bool: made, finite, and of the class aimed at by the guide."""
        return (self.found == self.targets) & ~self.skipped & ~self.nonfinite

    def name(self, label: int) -> str:
        """A class's name, or its number."""
        return self.classes[label] if self.classes else str(int(label))

    def take(self, rows: Any) -> Explanations:
        """Some of them, by whatever chooses rows of an array."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ARRAYS})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, to be stored; `from_arrays` reads them."""
        return {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: Sequence[str] | None, kind: str) -> Explanations:
        """What `arrays` gave. Raises KeyError: one is missing."""
        return cls(**{name: arrays[name] for name in ARRAYS}, classes=list(classes) if classes else None, kind=kind)

    @classmethod
    def join(cls, parts: Sequence[Explanations]) -> Explanations:
        """Several, one after the other. Raises ValueError: none."""
        if not parts:
            raise ValueError("no explanations to join")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
        return replace(parts[0], **joined)


ARRAYS = tuple(field.name for field in fields(Explanations) if field.name not in ("classes", "kind"))


def probabilities(classifier: nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, K >= 2) float32 softmax of a classifier's logits of (N, H, W, C) uint8 images."""
    with frozen(classifier):
        logits = two_sided(predict(classifier, images)).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def runner_up(probability: np.ndarray) -> np.ndarray:
    """(N,) int64, the second most likely class of each row of (N, K)."""
    return np.argsort(-probability, axis=1, kind="stable")[:, 1]
