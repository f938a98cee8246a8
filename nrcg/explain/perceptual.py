"""LPIPS (Zhang et al. 2018), where the package `lpips` and its weights are at hand; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from nrcg.data.arrays import to_unit

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
"""torchvision's weights below LPIPS, in torch.hub's folder of checkpoints."""
SMALLEST = 64
"""Pixels a side that the network needs; smaller images are enlarged."""


class Perceptual:
    """LPIPS with AlexNet.

    Attributes:
        model: The network, or None where it is missing.
        reason: Why it is missing.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.reason = ""
        weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
        try:
            import lpips
        except ImportError:
            self.reason = "the package lpips is not installed"
            return
        if not weights.is_file():
            self.reason = f"its weights {weights} are missing"
            return
        self.model = lpips.LPIPS(net="alex", verbose=False).eval()

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(N,) distances of (N, H, W, C) uint8 images."""
        pairs = []
        for images in (first, second):
            x = to_unit(images)
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            if min(x.shape[2:]) < SMALLEST:
                x = nn.functional.interpolate(x, size=(SMALLEST, SMALLEST), mode="bilinear")
            pairs.append(x)
        with torch.no_grad():
            return np.concatenate(
                [self.model(a, b).flatten().numpy() for a, b in zip(*(x.split(64) for x in pairs), strict=True)]
            )
