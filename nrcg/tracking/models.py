"""TODO tracking.models."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg.tracking.store import MAX_TAG, _cut, _quoted, _Store

if TYPE_CHECKING:
    from torch import nn


def _send_model(store: _Store, run_id: str, start: dict, entry: dict) -> None:
    """Export the weights of a folder and log them. What cannot be exported is named in the tag nrcg.model_error."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = store.experiment(start["experiment"])
    query = f"source_run_id = '{run_id}' and name = {_quoted(entry['name'])}"
    if any(str(model.status) == "READY" for model in store.client.search_logged_models([experiment_id], query)):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            if _weights_sha256(Path(entry["path"])) != entry["sha256"]:
                raise ValueError(f"{entry['path']} holds other weights now")
            exported = Path(folder) / "model"
            _export_model(Path(entry["path"]), exported)
        except Exception as error:
            store.client.set_tag(run_id, "nrcg.model_error", _cut(f"{type(error).__name__}: {error}", MAX_TAG))
            return
        model = store.client.create_logged_model(
            experiment_id, entry["name"], source_run_id=run_id, tags={"sha256": entry["sha256"]}
        )
        store.client.log_model_artifacts(model.model_id, os.fspath(exported))
        store.client.finalize_logged_model(model.model_id, "READY")
        store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _export_model(path: Path, out: Path) -> None:
    """Write a trained model's folder as an MLflow model."""
    import warnings

    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    module, inputs = _load_module(path)
    with torch.no_grad():
        output = module(*inputs.values())

    def spec(tensor: torch.Tensor, name: str | None = None) -> TensorSpec:
        return TensorSpec(np.dtype(str(tensor.dtype).removeprefix("torch.")), (-1, *tensor.shape[1:]), name)

    named = [spec(tensor, name if len(inputs) > 1 else None) for name, tensor in inputs.items()]
    signature = ModelSignature(inputs=Schema(named), outputs=Schema([spec(output)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            module,
            os.fspath(out),
            signature=signature,
            input_example=tuple(inputs.values()),
            serialization_format="pt2",  # a graph; the other format is a pickle
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )


def _load_module(path: Path) -> tuple[nn.Module, dict[str, Any]]:
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


def _weights_sha256(path: Path) -> str:
    """As the model's own record states it."""
    record = path / "training.json" if (path / "unet").is_dir() else path / "config.json"
    return json.loads(record.read_text())["sha256"]
