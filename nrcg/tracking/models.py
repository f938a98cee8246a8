"""A trained model's folder as an MLflow model: a graph that runs without this package, not a pickle."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def export_model(path: Path, out: Path) -> None:
    """Write a trained model's folder as an MLflow model."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    module, inputs = load_module(path)
    with torch.no_grad():
        output = module(*inputs.values())

    def spec(tensor: torch.Tensor, name: str | None = None) -> TensorSpec:
        return TensorSpec(np.dtype(str(tensor.dtype).removeprefix("torch.")), (-1, *tensor.shape[1:]), name)

    named = [spec(tensor, name if len(inputs) > 1 else None) for name, tensor in inputs.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            module,
            os.fspath(out),
            signature=ModelSignature(inputs=Schema(named), outputs=Schema([spec(output)])),
            input_example=tuple(inputs.values()),
            serialization_format="pt2",  # a graph; the other format is a pickle
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )


def load_module(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model on the CPU, and an input of batch size 2 by the names of its arguments."""
    import torch
    from torch import nn

    if (path / "unet").is_dir():
        from diffusers import UNet2DModel

        class NoisePrediction(nn.Module):
            """The U-Net with a plain tensor as its output."""

            def __init__(self, unet: nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return self.unet(x_t, t, return_dict=False)[0]

        unet = UNet2DModel.from_pretrained(path / "unet").eval()
        shape = (2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        return NoisePrediction(unet), {"x_t": torch.zeros(shape), "t": torch.tensor([1, 2])}
    from nrcg.classifiers.storage import open_classifier, read_classifier_config

    config = read_classifier_config(path)
    shape = (2, config.get("channels", 3), config["image_size"], config["image_size"])
    return open_classifier(path), {"x": torch.zeros(shape)}
