"""The diffusion model: schedule, forward process, one-step denoised image, posterior, and its U-Net.

Time follows the paper: t = 1..T, with x_0 the clean image; diffusers' timestep is t - 1.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nrcg.errors import DataError
from nrcg.files import read_record, sha256_file
from nrcg.integrity import remedy

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

    from nrcg.config import ScheduleConfig, UNetConfig

DATA_MEAN_FILE = "data_mean.npy"
"""Mean training image beside a pipeline's weights: (C, H, W) float32 in [-1, 1], for the start `data_mean`."""


RECORD_FILE = "training.json"
"""What made a pipeline's folder, with the checksums of its files."""
WEIGHTS_FILE = "unet/diffusion_pytorch_model.safetensors"


class Schedule:
    """abar_t for t = 0..T in float64, abar_0 = 1.

    Args:
        betas: (T,) variances beta_1..beta_T, each in (0, 1).
    """

    def __init__(self, betas: Tensor):
        betas = betas.detach().to("cpu", torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas: expected a vector of numbers in (0, 1)")
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1.0 - betas, dim=0)])
        self.num_steps = len(betas)
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def linear(cls, num_steps: int, beta_start: float, beta_end: float) -> Schedule:
        """Betas linear from beta_start to beta_end (Ho et al. 2020)."""
        return cls(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """The schedule by diffusers' names: linear, scaled_linear (linear in the root of beta; Rombach et al. 2022),
        squaredcos_cap_v2 (Nichol and Dhariwal 2021, eq. 17, betas capped at 0.999)."""
        if config.beta_schedule == "linear":
            return cls.linear(config.num_train_timesteps, config.beta_start, config.beta_end)
        if config.beta_schedule == "scaled_linear":
            ends = (config.beta_start**0.5, config.beta_end**0.5)
            return cls(torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64) ** 2)
        share = torch.linspace(0, 1, config.num_train_timesteps + 1, dtype=torch.float64)
        abar = torch.cos((share + 0.008) / 1.008 * torch.pi / 2) ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    @classmethod
    def from_scheduler(cls, scheduler: DDPMScheduler) -> Schedule:
        """The schedule of a diffusers scheduler."""
        return cls(scheduler.betas)

    def at(self, t: Tensor | int, like: Tensor) -> Tensor:
        """abar_t shaped to broadcast over `like` (B, C, H, W), in like's dtype and device."""
        if isinstance(t, Tensor) and t.device.type != "cpu":
            # The table goes to t's device, once: t coming to the CPU would hold up a GPU at every step.
            if t.device not in self._tables:
                self._tables[t.device] = self.abar.to(torch.float32).to(t.device)
            abar = self._tables[t.device][t.long()]
        else:
            abar = self.abar[torch.as_tensor(t).long()]
        return abar.reshape(-1, *[1] * (like.ndim - 1)).to(like.device, like.dtype)

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """eq. 2: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Args:
            x0: (B, C, H, W) in [-1, 1].
            t: one step or (B,) steps, 0..T; x_0 at t = 0.
            noise: eps, shaped like x0.
        """
        abar = self.at(t, x0)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise

    def pred_x0(self, x_t: Tensor, eps: Tensor, t: Tensor | int, *, clip: bool = False) -> Tensor:
        """eq. 5, the one-step denoised image: (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); clip: to [-1, 1]."""
        abar = self.at(t, x_t)
        x0 = (x_t - (1.0 - abar).sqrt() * eps) / abar.sqrt()
        return x0.clamp(-1.0, 1.0) if clip else x0

    def posterior(self, t: int, t_prev: int | None = None) -> tuple[float, float, float]:
        """q(x_prev | x_t, x_0) of Ho et al. 2020, eqs. 6 and 7.

        Args:
            t: step, 1..T.
            t_prev: the step reached, t - 1 unless steps are skipped.

        Returns:
            (a, b, variance): the mean is a * x_0 + b * x_t; the variance is Sigma_t (`fixed_small`), 0 at t_prev = 0.
        """
        t_prev = t - 1 if t_prev is None else t_prev
        abar, abar_prev = float(self.abar[t]), float(self.abar[t_prev])
        alpha = abar / abar_prev
        beta = 1.0 - alpha
        return (
            abar_prev**0.5 * beta / (1.0 - abar),
            alpha**0.5 * (1.0 - abar_prev) / (1.0 - abar),
            (1.0 - abar_prev) / (1.0 - abar) * beta,
        )


@dataclass(frozen=True)
class Prediction:
    """What the U-Net says of x_t, whatever it was trained to predict.

    Attributes:
        eps: the noise, (B, C, H, W) float32.
        log_variance_share: for learned variances, where log Sigma_t lies between the posterior's (0) and beta_t's (1);
            None where the variance is not learned.
    """

    eps: Tensor
    log_variance_share: Tensor | None = None

    def detach(self) -> Prediction:
        share = self.log_variance_share
        return Prediction(self.eps.detach(), None if share is None else share.detach())


def as_prediction(output: Tensor | Prediction) -> Prediction:
    """A Prediction; a tensor is taken for eps."""
    return output if isinstance(output, Prediction) else Prediction(output)


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def to_eps(output: Tensor, x_t: Tensor, t: int, schedule: Schedule, prediction_type: str) -> Tensor:
    """The noise prediction of a U-Net that predicts eps, x_0 (`sample`) or v = sqrt(abar) eps - sqrt(1 - abar) x_0
    (`v_prediction`, Salimans and Ho 2022).

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return output
    abar = schedule.at(t, x_t)
    if prediction_type == "sample":
        return (x_t - abar.sqrt() * output) / (1.0 - abar).sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt() * output + (1.0 - abar).sqrt() * x_t
    raise ValueError(f"prediction_type {prediction_type!r} is not supported; allowed: {', '.join(PREDICTION_TYPES)}")


def build_unet(config: UNetConfig, image_size: int, channels: int) -> UNet2DModel:
    """diffusers' UNet2DModel with self-attention at the levels that `config.attention` marks."""
    from diffusers import UNet2DModel

    levels = len(config.block_out_channels)
    if image_size % 2 ** (levels - 1):
        raise DataError(
            f"image_size: {image_size} cannot be halved {levels - 1} times; "
            f"take a multiple of {2 ** (levels - 1)} or fewer block_out_channels"
        )
    down = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention]
    up = ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention)]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
    )


def build_scheduler(config: ScheduleConfig) -> DDPMScheduler:
    """diffusers' DDPMScheduler: eps-prediction, Sigma_t = posterior variance, x0hat clipped."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        variance_type="fixed_small",
        prediction_type="epsilon",
        clip_sample=True,
    )


def read_data_mean(folder: str | Path) -> Tensor | None:
    """The mean training image stored with a pipeline, (C, H, W) in [-1, 1], or None where there is none."""
    path = Path(folder) / DATA_MEAN_FILE
    if not path.exists():
        return None
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, EOFError) as error:
        again = remedy(path, "train the diffusion model anew or delete the file")
        raise DataError(f"{path}: cannot be read ({error}); {again}") from None


def check_pipeline_files(folder: Path) -> None:
    """Compare a pipeline folder with the checksums of its training.json; one without that file passes.

    Raises:
        DataError: a file has changed, or training.json is damaged.
    """
    record_path = folder / RECORD_FILE
    if not record_path.exists():
        return
    otherwise = f"restore it, or train one into {folder} (see nrcg train-ddpm --help)"
    try:
        record = read_record(record_path)
        sums = dict(record.get("files") or {WEIGHTS_FILE: record["sha256"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_path}: damaged ({error}); {remedy(record_path, otherwise)}") from None
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: not found; {remedy(path, otherwise)}")
        if sha256_file(path) != expected:
            raise DataError(f"{path}: damaged (not what {RECORD_FILE} says, checksum); {remedy(path, otherwise)}")


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises DataError for a device not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DataError(f"device: {device} is not there; {torch.cuda.device_count()} CUDA devices are visible")
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without these instructions the CPU emulates bfloat16 and loses time.
    native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast of the networks; parameters, x_t, losses and gradients stay in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no parameter gradients: guidance needs the gradient of its input alone."""
    return module.eval().requires_grad_(False)
