"""Logits, and what they say: log-probabilities, classes, accuracy, calibration. One logit means binary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.data.arrays import to_unit
from nrcg.errors import DataError

BATCH = 256
"""Images at once in `predict`."""


def class_log_prob(logits: Tensor, target: int) -> Tensor:
    """log p(target | x) from logits.

    Args:
        logits: (B, K). K = 1 is binary: the logit of class 1 against class 0.
        target: class index, 0..K-1 (0 or 1 for one logit).

    Returns:
        (B,) log-probabilities: log-softmax at the target, or log-sigmoid of plus or minus the one logit.
    """
    if logits.shape[1] == 1:
        return F.logsigmoid(logits[:, 0] if target == 1 else -logits[:, 0])
    return F.log_softmax(logits, dim=1)[:, target]


def predicted_class(logits: Tensor) -> Tensor:
    """(B,) most likely class of (B, K) logits; one logit means binary."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def logits_of(output: Any) -> Tensor:
    """The logits of a network's output: a tensor or an object with `.logits`.

    Raises:
        TypeError: neither.
        ValueError: not (B, K).
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the classifier gave {type(output).__name__}; expected logits (B, K) or an object with .logits"
        )
    if logits.ndim != 2:
        raise ValueError(f"the classifier gave logits of shape {tuple(logits.shape)}; expected (B, K)")
    return logits


def class_index(classes: Sequence[str], target: str | int) -> int:
    """A class by name or by number. Raises DataError that lists the classes."""
    text = str(target)
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise DataError(f"target {text!r} is no class of the classifier; allowed: {names} or 0..{len(classes) - 1}")


def predict(classifier: nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, K) float32 logits of (N, H, W, C) uint8 images."""
    parameter = next(classifier.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    logits = []
    with torch.no_grad():
        for first in range(0, len(images), BATCH):
            logits.append(classifier(to_unit(images[first : first + BATCH]).to(device)).float().cpu())
    return torch.cat(logits).numpy()


def class_hits(logits: np.ndarray, target: int) -> np.ndarray:
    """Which images are taken for a class; their mean is the paper's "accuracy".

    Args:
        logits: (N, K). K = 1 is binary: class 1 where the logit is positive, else class 0.
        target: Class index.

    Returns:
        (N,) bool.

    Raises:
        ValueError: Another shape, or a target that is no class.
        DataError: Logits that are not finite.
    """
    logits = two_logits(logits)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target {target} is none of the {logits.shape[1]} classes")
    return logits.argmax(axis=1) == target


def target_share(logits: np.ndarray, target: int) -> float:
    """Share, in [0, 1], of `class_hits`."""
    return float(class_hits(logits, target).mean())


def two_logits(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K >= 2) from (N, K >= 1), checked; one logit is class 1's against zero. Errors as in `class_hits`."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be (N, K) with N and K at least 1, got shape {logits.shape}")
    if not np.isfinite(logits).all():
        raise DataError("logits are not all finite")
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if logits.shape[1] == 1 else logits


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of confidence of |bin| / N * |accuracy - mean confidence|, in [0, 1].

    Guo et al. 2017 (arXiv 1706.04599, eq. 3), bins of equal width.

    Args:
        logits: (N, K) as in `class_hits`.
        labels: (N,) class indices.
        bins: Number of bins.
    """
    logits = two_logits(logits).astype(np.float64)
    labels = np.asarray(labels)
    if labels.shape != (len(logits),):
        raise ValueError(f"{len(logits)} logits but labels of shape {labels.shape}")
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = weights.max(axis=1) / weights.sum(axis=1)
    surplus = (logits.argmax(axis=1) == labels) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, surplus, bins)).sum() / len(logits))
