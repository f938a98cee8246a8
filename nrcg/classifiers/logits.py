"""Logits (N, K) and what they say: probabilities, classes, accuracy, calibration.

One logit means a binary classifier: it is class 1's against zero. `two_sided` says so for arrays and tensors alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.data.arrays import to_unit
from nrcg.devices import floating_type
from nrcg.errors import DataError

BATCH = 256
"""Images that `predict` shows a classifier at once."""
Logits = TypeVar("Logits", np.ndarray, Tensor)


def two_sided(logits: Logits) -> Logits:
    """Logits (N, K >= 2) from logits (N, K >= 1): softmax of (0, z) is sigmoid of z, class 1's probability."""
    if logits.shape[1] != 1:
        return logits
    if isinstance(logits, Tensor):
        return torch.cat([torch.zeros_like(logits), logits], dim=1)
    return np.concatenate([np.zeros_like(logits), logits], axis=1)


def class_log_prob(logits: Tensor, target: int | Tensor) -> Tensor:
    """log p(target | x) from logits.

    Args:
        logits: (B, K); K = 1 is binary.
        target: Class index, 0..K-1 (0 or 1 for one logit), or each sample's own, (B,) int64.

    Returns:
        (B,) log-probabilities: log-softmax at the target, or log-sigmoid of plus or minus the one logit.
    """
    if logits.shape[1] == 1:  # two_sided's, but its gradient does not vanish where float32 rounds p to 1
        if isinstance(target, Tensor):
            return F.logsigmoid(logits[:, 0] * (2 * target - 1))
        return F.logsigmoid(logits[:, 0] if target == 1 else -logits[:, 0])
    log_probs = F.log_softmax(logits, dim=1)
    if isinstance(target, Tensor):
        return log_probs.gather(1, target.reshape(-1, 1))[:, 0]
    return log_probs[:, target]


def predicted_class(logits: Logits) -> Logits:
    """(N,) most likely class of logits (N, K)."""
    return two_sided(logits).argmax(1)


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) of a network's output: a tensor, (B,) where it is binary, an object or a mapping with `logits`,
    or a tuple, list or mapping of one tensor.

    Raises:
        TypeError: none of these.
        ValueError: not (B, K).
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output["logits"] if "logits" in output else _only(list(output.values()))
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple | list):
            logits = _only(output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the classifier gave {type(output).__name__}; expected logits (B, K) or an object with .logits: "
            "wrap it in a function that returns them"
        )
    if logits.ndim == 1:
        return logits[:, None]
    if logits.ndim != 2:
        raise ValueError(f"the classifier gave logits of shape {tuple(logits.shape)}; expected (B, K)")
    return logits


def _only(values: Sequence[Any]) -> Any:
    """The one entry of a sequence, None where there are others."""
    return values[0] if len(values) == 1 else None


def class_index(classes: Sequence[str], target: str | int) -> int:
    """A class by name or by number. Raises DataError that lists the classes."""
    text = str(target)
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    last = len(classes) - 1
    raise DataError(f"target {text!r} is no class of the classifier; allowed: {listed(classes)} or 0..{last}")


def listed(classes: Sequence[str]) -> str:
    """Names for a message, at most 20 of them."""
    return ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")


def predict(classifier: nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, K) float32 logits of (N, H, W, C) uint8 images."""
    parameter = next(classifier.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = floating_type(classifier)
    logits = []
    with torch.no_grad():
        for first in range(0, len(images), BATCH):
            logits.append(classifier(to_unit(images[first : first + BATCH]).to(device, dtype)).float().cpu())
    return torch.cat(logits).numpy()


def class_hits(logits: np.ndarray, target: int) -> np.ndarray:
    """Which images a classifier takes for a class; their share is the paper's "accuracy".

    Args:
        logits: (N, K).
        target: Class index.

    Returns:
        (N,) bool.

    Raises:
        ValueError: logits of another shape, or a target that is no class.
        DataError: logits that are not finite.
    """
    logits = _checked(logits)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target {target} is none of the {logits.shape[1]} classes")
    return predicted_class(logits) == target


def target_share(logits: np.ndarray, target: int) -> float:
    """Share, in [0, 1], of `class_hits`."""
    return float(class_hits(logits, target).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of confidence of |bin| / N * |accuracy - mean confidence|, in [0, 1].

    Guo et al. 2017 (arXiv 1706.04599, eq. 3), bins of equal width.

    Args:
        logits: (N, K).
        labels: (N,) class indices.
        bins: Number of bins.

    Raises:
        ValueError: arrays of other shapes.
        DataError: logits that are not finite.
    """
    logits = _checked(logits).astype(np.float64)
    labels = np.asarray(labels)
    if labels.shape != (len(logits),):
        raise ValueError(f"{len(logits)} logits but labels of shape {labels.shape}")
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = weights.max(axis=1) / weights.sum(axis=1)
    surplus = (predicted_class(logits) == labels) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, surplus, bins)).sum() / len(logits))


def _checked(logits: np.ndarray) -> np.ndarray:
    """Finite logits (N, K >= 2)."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be (N, K) with N and K at least 1, got shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise DataError("logits are not all finite")
    return two_sided(logits)
