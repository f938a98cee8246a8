"""Distances d(x, x*) of an explanation from its image, as terms of a gradient and as proximal steps.

l1, l15, l2    Lp^p / D, p = 1, 1.5, 2: the mean over the D pixels and channels of |x - x*|^p, in [-1, 1] units
features       norm2(f(x) - f(x*))^2 / norm2(f(x*))^2, f the penultimate features of a classifier
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nrcg.config.explaining import DISTANCES, EXPONENTS
from nrcg.devices import floating_type


class Distance(ABC):
    """A distance of images (B, C, H, W) from as many others."""

    module: nn.Module | None = None
    """A network that it uses."""

    @abstractmethod
    def __call__(self, x: Tensor, original: Tensor) -> Tensor:
        """(B,) distances >= 0, differentiable in x."""

    def prox(self, x: Tensor, original: Tensor, strength: Tensor) -> Tensor:
        """The minimum over z of norm2(z - x)^2 / 2 + strength * d(z, original), (B, C, H, W).

        Args:
            strength: (B, 1, 1, 1), >= 0.

        Raises:
            NotImplementedError: it has no closed form.
        """
        raise NotImplementedError(f"{type(self).__name__} has no proximal step")


class PixelDistance(Distance):
    """Lp^p / D. For p = 1 the proximal step leaves pixels that nothing moves exactly as they were."""

    def __init__(self, exponent: float):
        if exponent not in EXPONENTS.values():
            raise ValueError(f"exponent: {exponent} is none of {', '.join(map(str, EXPONENTS.values()))}")
        self.exponent = exponent

    def __call__(self, x: Tensor, original: Tensor) -> Tensor:
        return (x - original).abs().pow(self.exponent).flatten(1).mean(dim=1)

    def prox(self, x: Tensor, original: Tensor, strength: Tensor) -> Tensor:
        weight = strength / x[0].numel()
        gap = x - original
        if self.exponent == 1.0:  # soft thresholding
            return original + gap.sign() * (gap.abs() - weight).clamp(min=0.0)
        if self.exponent == 2.0:
            return original + gap / (1.0 + 2.0 * weight)
        # z + 1.5 w sqrt(z) = |gap| for the new size z; in this form of the root nothing cancels.
        size, half = gap.abs(), 1.5 * weight
        root = 2.0 * size / (half + (half.square() + 4.0 * size).sqrt()).clamp(min=torch.finfo(size.dtype).tiny)
        return original + gap.sign() * root.square()


class FeatureDistance(Distance):
    """Squared distance in a classifier's features, relative to the image's own.

    Args:
        classifier: has `features`, images in [-1, 1] to (B, D), as `nrcg.Classifier`.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, classifier: nn.Module):
        if not hasattr(classifier, "features"):
            raise ValueError("distance features: needs a classifier with features, such as an nrcg.Classifier")
        self.module = classifier

    def __call__(self, x: Tensor, original: Tensor) -> Tensor:
        dtype = floating_type(self.module)
        with torch.no_grad():
            wanted = self.module.features(original.to(dtype)).to(x.dtype)
        squares = (self.module.features(x.to(dtype)).to(x.dtype) - wanted).square().sum(dim=1)
        return squares / wanted.square().sum(dim=1).clamp(min=torch.finfo(x.dtype).tiny)


def load_distance(name: str, classifier: nn.Module | None = None) -> Distance:
    """A distance by its name in DISTANCES.

    Args:
        classifier: whose features `features` compares.

    Raises:
        ValueError: another name, or features of nothing.
    """
    if name not in DISTANCES:
        raise ValueError(f"distance: {name!r} is unknown; allowed: {', '.join(DISTANCES)}")
    if name in EXPONENTS:
        return PixelDistance(EXPONENTS[name])
    if classifier is None:
        raise ValueError("distance features: needs a classifier")
    return FeatureDistance(classifier)
