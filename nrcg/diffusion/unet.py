"""The U-Net and the scheduler that the configuration describes, as diffusers builds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nrcg.errors import DataError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

    from nrcg.config import ScheduleConfig, UNetConfig


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


def build_scheduler(config: ScheduleConfig, prediction_type: str = "epsilon") -> DDPMScheduler:
    """diffusers' DDPMScheduler: Sigma_t = posterior variance, x0hat clipped.

    Args:
        prediction_type: What the U-Net puts out (`nrcg.diffusion.objectives.PREDICTION_TYPES`).
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        variance_type="fixed_small",
        prediction_type=prediction_type,
        clip_sample=True,
    )
