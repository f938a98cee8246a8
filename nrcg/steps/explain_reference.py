"""Features that explanations are measured in: of real images to compare with, and of whoever is in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nrcg.config.explaining import OWN_CLASS
from nrcg.errors import DataError
from nrcg.evaluation.custom_images import chosen_protocols, target_images
from nrcg.evaluation.features import Extractor, extract, load_extractor
from nrcg.evaluation.pairwise import DENSITY_K
from nrcg.evaluation.references import Reference, ReferenceCollector
from nrcg.evaluation.sides import Side, in_parts
from nrcg.guidance.targets import class_of
from nrcg.pipeline.progress import Progress

BLOCK = 512
"""Real images read at a time."""


@dataclass(frozen=True)
class RealImages:
    """Real images that explanations are compared with.

    Attributes:
        side: The images; their labels say which are of the class aimed at.
        features: Protocols, as of `nrcg evaluate`.
        weights_dir: Folder of the Inception weights.
        num_pairwise: Images that are compared in pairs; None: all.
    """

    side: Side
    features: Sequence[str] = ("auto",)
    weights_dir: str | Path = "weights"
    num_pairwise: int | None = 10_000


def read_reference(
    real: RealImages,
    shape: tuple[int, int, int],
    *,
    guide: nn.Module,
    judge: nn.Module | None,
    kind: str,
    target: str | None,
    device: torch.device,
) -> tuple[list[Extractor], list[Reference], list[str]]:
    """Real images as each protocol sees them; those of the class aimed at apart, where that is one and labels tell.

    Args:
        real: The images.
        shape: (C, H, W) of the explanations; images of another size are refused.
        guide: Whose classes the target is one of.
        judge: Classifier of the protocol `judge`; None: there is none.
        kind, target: Of the explanations.
        device: Of the networks.

    Returns:
        Extractors, a reference for each, and a line about what is not compared.

    Raises:
        DataError: Too few images, of another size, or without one of the target.
    """
    side, chosen, notes = real.side, None, []
    if side.count <= DENSITY_K:
        raise DataError(f"--reference: {side.path} holds {side.count} images; {DENSITY_K + 1} or more are needed")
    if target is None or kind in OWN_CLASS:
        notes.append("--reference: there is not one class aimed at; all of its images are compared")
    elif side.labels is None:
        notes.append(
            "--reference: without labels all of its images are compared; --reference-labels, or a folder per class,"
            f" gives the distance to those of {target}"
        )
    else:
        chosen = target_images(side, target, guide, class_of(guide, target))
    protocols = chosen_protocols(real.features, real.weights_dir, judge, "--judge")
    extractors = [load_extractor(one, weights_dir=real.weights_dir, judge=judge, device=device) for one in protocols]
    collectors = [ReferenceCollector(one, None if chosen is None else 1, real.num_pairwise) for one in extractors]
    remedy = "--resize-reference resizes"
    with Progress("reference", side.count, "image") as bar:
        for first, images in in_parts(side, side.count, BLOCK, shape, remedy):
            labels = None if chosen is None else chosen[first : first + len(images)]
            for collector, extractor in zip(collectors, extractors, strict=True):
                collector.add(checked_features(extractor, images), labels)
            bar.set(first + len(images))
    described = str(side.path) + (f", resized to {side.image_size} first" if side.image_size is not None else "")
    return extractors, [one.finish(described=described, device=device) for one in collectors], notes


def checked_features(extractor: Extractor, images: np.ndarray) -> np.ndarray:
    """(n, dim) features of (n, H, W, C) uint8 images.

    Raises:
        DataError: The network does not take images of this shape.
    """
    try:
        return extract(extractor, images)
    except DataError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        shape, reason = " x ".join(map(str, images.shape[1:])), str(error).strip().splitlines()[0]
        raise DataError(f"features {extractor.name}: fails on images of {shape} ({reason}); give others") from error
