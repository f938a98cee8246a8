"""Pictures of what a diffusion model draws, while it is trained and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.storage import open_classifier
from nrcg.config import DDPMConfig
from nrcg.data.arrays import to_uint8
from nrcg.data.pictures import sample_grid, save_png
from nrcg.errors import DataError
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.stabilizers import Adam
from nrcg.pipeline.progress import show_picture

COLUMNS, EARLY_COLUMNS = 6, 4
"""Of the grid at the end, and of those before, which must not cost much of the training."""
SHOWN_SIZE = 64
"""Pixels of an image in a picture, at least about so many."""
PREVIEW_CLASSES = 3
"""Rows of guided samples, one for each of a classifier's first classes."""
PREVIEW_SCALE = 0.1
"""ADAM's steps are as large whatever a classifier's gradients are, so that one scale shows each data set's classes."""


@dataclass
class Grids:
    """Draws sample grids of a diffusion model. Large images on a CPU, where a grid takes hours, are few, by DDIM.

    Attributes:
        scheduler: The model's diffusers scheduler.
        config: Its settings.
        mean: The data's mean image, (C, H, W) in [-1, 1].
        precision: Autocast of the U-Net.
    """

    scheduler: Any
    config: DDPMConfig
    mean: np.ndarray
    precision: torch.dtype

    def draw(self, unet: nn.Module, path: Path, columns: int = COLUMNS) -> None:
        """Unguided samples, as many rows as columns."""
        columns = self._columns(unet, columns)
        _save(self._sample(unet, columns**2), columns, path)

    def draw_early(self, unet: nn.Module, path: Path, preview: Sequence[Path]) -> list[Path]:
        """`draw` while the training goes on, and say where; guided ones too, by the first classifier that is there.

        Returns:
            The pictures' paths.
        """
        self.draw(unet, path, EARLY_COLUMNS)
        show_picture(path, "Samples of the diffusion model in training")
        there = list(filter(None, map(_opened, preview)))
        if not there:
            return [path]
        classifier = there[0].to(next(unet.parameters()).device)
        guided = path.with_stem(f"{path.stem}_guided")
        targets = range(min(classifier.count_classes(), PREVIEW_CLASSES))
        guidances = [ClassifierGuidance(classifier, target, PREVIEW_SCALE, stabilizer=Adam()) for target in targets]
        columns = self._columns(unet, EARLY_COLUMNS)
        rows = [self._sample(unet, columns, guidance) for guidance in (None, *guidances)]
        _save(np.concatenate(rows), columns, guided)
        names = classifier.classes or list(map(str, targets))
        show_picture(guided, f"The same guided; its rows: unguided, {', '.join(names[: len(targets)])}")
        return [path, guided]

    def _costly(self, unet: nn.Module) -> bool:
        return self.mean.shape[-1] > 64 and next(unet.parameters()).device.type == "cpu"

    def _columns(self, unet: nn.Module, most: int) -> int:
        return most if not self._costly(unet) else 2 if self.mean.shape[-1] <= 128 else 1

    def _sample(self, unet: nn.Module, count: int, guidance: ClassifierGuidance | None = None) -> np.ndarray:
        """(count, H, W, C) uint8; the same seeds at each call."""
        pipe, steps = GuidedDDPMPipeline(unet, self.scheduler), None
        pipe.data_mean = torch.from_numpy(self.mean)
        if self._costly(unet):
            pipe.use_sampler("ddim")
            steps = min(10, len(self.scheduler.betas))
        out = pipe(
            num_samples=count,
            batch_size=grid_batch(self.mean.shape[-1]),
            seed=self.config.seed,
            num_inference_steps=steps,
            precision=self.precision,
            guidance=guidance,
            on_step=lambda done: None,
        )
        return to_uint8(out.samples)


def _opened(folder: Path) -> Classifier | None:
    try:
        return open_classifier(folder)
    except DataError:  # not trained yet; what else is wrong with it its own job says
        return None


def grid_batch(image_size: int) -> int:
    """Samples at once of a grid: the memory of 36 at 64 x 64."""
    return min(max(36 * 64**2 // image_size**2, 1), 36)


def _save(images: np.ndarray, columns: int, path: Path) -> None:
    """Small images are enlarged, each pixel to a square."""
    factor = max(SHOWN_SIZE // images.shape[1], 1)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, sample_grid(images, columns))
