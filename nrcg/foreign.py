"""Models and statistics in the form in which the paper's authors saved them: read, checked, given as our own objects.

No pickle is trusted: `torch.load` with weights_only alone. A weight that is not finite is refused.
"""

from __future__ import annotations

import inspect
import json
import pickle
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nrcg.classifiers.architectures import build_module, replace_first_conv
from nrcg.devices import freeze
from nrcg.errors import DataError
from nrcg.evaluation.frechet import FeatureStatistics
from nrcg.files import sha256_file
from nrcg.guidance.pipeline import SUPPORTED, GuidedDDPMPipeline

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


INCEPTION_DIM = 2048
ROUNDING = 1e-4
"""Of the largest product or the trace: torcheval multiplies features in float32, also where it adds up in float64."""
STATISTICS_KEYS = {"real_sum", "real_cov_sum", "num_real_images"}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull in the clone")


def damaged(path: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{path}: damaged ({reason}); fetch it anew, or leave it out: --assign {path}=ignore")


def load_pt(path: Path) -> Any:
    """What torch.save wrote, on the CPU; tensors and plain containers alone."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise DataError(
            f"{path}: refused, it holds more than tensors and could run code; leave it out: --assign {path}=ignore"
        ) from None
    except Exception as error:  # whatever a cut-off archive raises
        raise damaged(path, error) from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or .bin. Raises DataError: damaged, no state dict, or a weight is not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pointer(path)
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from None
    else:
        state = load_pt(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no weights by name")
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{path}: {name} holds values that are not finite")
    return state


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; a diffusers folder needs it, fetch it anew") from None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object")
    return content


def part_folder(folder: Path, name: str) -> Path:
    """A pipeline's subfolder, or the folder itself as in old pipelines."""
    return folder / name if (folder / name).is_dir() else folder


@dataclass
class ReleasedDDPM:
    """A diffusion model as read: with the SHA-256 of its weights' file and what was changed on the way."""

    unet: UNet2DModel
    scheduler: DDPMScheduler
    source: Path
    sha256: str
    changes: list[str]


def read_ddpm(folder: Path) -> ReleasedDDPM:
    """A diffusers folder of an unconditional DDPM, whatever class its model_index.json names; nothing of it is run.

    Raises:
        DataError: a file is missing or damaged, the weights are not exactly the U-Net's or not finite, it is no
            unconditional DDPM, or the scheduler is not supported.
    """
    index = read_json(folder / "model_index.json")
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and any(entry)}
    unet_class = (parts.get("unet") or [None])[-1]
    if set(parts) != {"unet", "scheduler"} or unet_class != "UNet2DModel":
        raise DataError(
            f"{folder / 'model_index.json'}: no unconditional DDPM: has {', '.join(sorted(parts)) or 'no parts'} with "
            f"the U-Net {unet_class}; expected scheduler and unet, a UNet2DModel"
        )
    changes = []
    if index.get("_class_name") != "DDPMPipeline":
        changes.append(f"pipeline {index.get('_class_name')} written as DDPMPipeline")
    unet_folder = part_folder(folder, "unet")
    weights = next((unet_folder / name for name in WEIGHTS if (unet_folder / name).is_file()), None)
    if weights is None:
        raise DataError(f"{unet_folder}: holds none of {', '.join(WEIGHTS)}; fetch it (git lfs pull)")
    unet = _build_unet(read_json(unet_folder / "config.json"), weights)
    scheduler, name = _ddpm_scheduler(part_folder(folder, "scheduler") / "scheduler_config.json")
    if name != "DDPMScheduler":
        changes.append(f"scheduler {name} written as DDPMScheduler")
    try:
        pipe = GuidedDDPMPipeline(unet, scheduler)
        pipe.sampler()
        pipe.noise_predictor(torch.float32)
    except ValueError as error:
        raise DataError(f"{folder / 'scheduler'}: {error}") from None
    return ReleasedDDPM(unet, scheduler, weights, sha256_file(weights), changes)


def _build_unet(config: dict, weights: Path) -> UNet2DModel:
    """The U-Net of a configuration with the weights of a file, none missing and none left over."""
    from diffusers import UNet2DModel
    from safetensors.torch import save_file

    state = {name: value.float().contiguous().clone() for name, value in _load_tensors(weights).items()}
    with tempfile.TemporaryDirectory() as folder:
        # diffusers reads a folder, and renames the weights of its older versions on the way.
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(state, Path(folder) / WEIGHTS[0], metadata={"format": "pt"})
        try:
            unet, said = UNet2DModel.from_pretrained(
                folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except Exception as error:  # whatever the configuration makes diffusers raise
            reason = (str(error) or type(error).__name__).strip().splitlines()[0].replace(folder, str(weights.parent))
            raise DataError(f"{weights}: not the weights of its config.json ({reason})") from None
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown"), ("mismatched_keys", "misfits")):
        if said[key]:
            raise DataError(f"{weights}: {what} {said[key][0]} (and {len(said[key]) - 1} more) of its config.json")
    return freeze(unet)


def _ddpm_scheduler(path: Path) -> tuple[DDPMScheduler, str]:
    """A DDPMScheduler with the settings of a file, and the class that the file names.

    A class that diffusers does not know is taken for a DDPMScheduler's subclass where the file states its betas.
    """
    import diffusers
    from diffusers import DDPMScheduler

    config = read_json(path)
    name = str(config.get("_class_name"))
    if name not in SUPPORTED:
        needed = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}
        if hasattr(diffusers, name) or not needed <= config.keys():
            raise DataError(f"{path}: scheduler {name} is not supported; allowed: {', '.join(SUPPORTED)}")
    known = inspect.signature(DDPMScheduler.__init__).parameters.keys()
    try:
        return DDPMScheduler(**{key: value for key, value in config.items() if key in known}), name
    except Exception as error:  # whatever the settings make diffusers raise
        raise DataError(f"{path}: no settings of a DDPMScheduler ({error})") from None


@dataclass
class ReleasedClassifier:
    """A classifier as read.

    Attributes:
        num_logits: K of the last layer; 1 is binary.
        first_conv: in_channels and bias, where they are not torchvision's; else None.
    """

    module: nn.Module
    num_logits: int
    first_conv: dict | None
    sha256: str


def read_classifier(path: Path) -> ReleasedClassifier:
    """A MobileNetV3 small that was saved inside a module which calls it `classifier`.

    Raises:
        DataError: damaged, another architecture, or a weight is not finite.
    """
    state = {name.removeprefix("classifier."): value for name, value in _load_tensors(path).items()}
    conv, last = state.get("features.0.0.weight"), state.get("classifier.3.weight")
    if conv is None or last is None or conv.ndim != 4 or last.ndim != 2:
        raise DataError(f"{path}: no MobileNetV3 small: features.0.0.weight or classifier.3.weight is missing")
    num_logits, in_channels, bias = len(last), conv.shape[1], "features.0.0.bias" in state
    # Its batch norm is torchvision's: the momentum plays no part in eval mode.
    module = build_module("mobilenet_v3_small", num_logits, 0.01)
    first_conv = {"in_channels": in_channels, "bias": bias} if bias or in_channels != 3 else None
    if first_conv is not None:
        replace_first_conv(module, in_channels, bias)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:24])
        raise DataError(f"{path}: no MobileNetV3 small ({reason} ...)") from None
    return ReleasedClassifier(freeze(module), num_logits, first_conv, sha256_file(path))


def read_torcheval_state(path: Path, dim: int = INCEPTION_DIM) -> FeatureStatistics:
    """The real images' side of a torcheval FrechetInceptionDistance, `torch.save(metric.state_dict(), path)`.

    Args:
        dim: length of a feature vector, expected.

    Raises:
        DataError: no such state, or no sums of real vectors: not finite, fewer than 2, or the covariance is not
            symmetric or not positive semi-definite by more than ROUNDING.
    """
    state = load_pt(path)
    if not isinstance(state, dict) or not state.keys() >= STATISTICS_KEYS:
        raise DataError(f"{path}: no torcheval state: real_sum, real_cov_sum or num_real_images is missing")
    total, outer, count = (torch.as_tensor(state[name]) for name in ("real_sum", "real_cov_sum", "num_real_images"))
    if total.shape != (dim,) or outer.shape != (dim, dim) or count.numel() != 1:
        raise DataError(
            f"{path}: real_sum {tuple(total.shape)} and real_cov_sum {tuple(outer.shape)}; torcheval's Inception has "
            f"({dim},) and ({dim}, {dim})"
        )
    n, total, outer = int(count), total.double().numpy(), outer.double().numpy()
    if n < 2:
        raise DataError(f"{path}: made of {n} real images; at least 2 are needed")
    if not (np.isfinite(total).all() and np.isfinite(outer).all()):
        raise DataError(f"{path}: holds values that are not finite")
    if np.abs(outer - outer.T).max() > ROUNDING * np.abs(outer).max():
        raise DataError(f"{path}: real_cov_sum is not symmetric")
    outer = (outer + outer.T) / 2
    statistics = FeatureStatistics.from_sums(n, total, outer)
    scatter = statistics.scatter.copy()
    # A shifted matrix has a Cholesky factor where no eigenvalue lies below minus the shift; much cheaper than those.
    scatter[np.diag_indices(dim)] += ROUNDING * np.trace(outer)
    try:
        np.linalg.cholesky(scatter)
    except np.linalg.LinAlgError:
        raise DataError(f"{path}: the covariance of real_sum and real_cov_sum is not positive semi-definite") from None
    return statistics
