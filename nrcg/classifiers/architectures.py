"""Networks that the package trains: a small one of its own, and those of torchvision."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from nrcg.errors import DataError


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with batch norm, pooled over the image: a judge that is cheap on a CPU.

    Args:
        num_classes: K, the number of logits.
        width: Channels of the first layer; the features before the last linear layer have 2 * width.
    """

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        channels = (3, width, width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for level, (inside, outside) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]
            if level % 2:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, K) logits."""
        return self.head(self.body(x).mean(dim=(2, 3)))


def build_module(architecture: str, num_classes: int, batch_norm_momentum: float) -> nn.Module:
    """A randomly initialised classification network.

    Args:
        architecture: `small_cnn`, or the name of a torchvision classification model.
        num_classes: K, the number of logits.
        batch_norm_momentum: Share of a batch in the running statistics of batch norm.

    Raises:
        DataError: no such architecture.
    """
    if architecture == "small_cnn":
        module: nn.Module = SmallCNN(num_classes)
    else:
        from torchvision import models

        # get_model would also build detection and segmentation models.
        if architecture not in models.list_models(module=models):
            allowed = "small_cnn or a torchvision model's name"
            raise DataError(f"architecture {architecture!r} is unknown; allowed: {allowed}")
        module = models.get_model(architecture, weights=None, num_classes=num_classes)
    set_momentum(module, batch_norm_momentum)
    return module


def set_momentum(module: nn.Module, momentum: float) -> None:
    """Set the share of a batch in the running statistics of every batch norm."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
