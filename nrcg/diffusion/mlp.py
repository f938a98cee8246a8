"""A small multilayer perceptron in the place of a U-Net, for points instead of images."""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class PointMLP(ModelMixin, ConfigMixin):
    """A diffusers model of points (B, D, 1, 1), with residual blocks and the timestep in each.

    Args:
        in_channels: D.
        width: Of the hidden layers.
        num_blocks: Residual blocks of two layers.
        num_octaves: Of the coordinates' sines and cosines beside them, at periods of 4, 2, 1, ...: without these a
            small network learns what varies within a tenth of a unit many times more slowly.
        sample_size: 1; diffusers' pipelines ask for it.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 2, width: int = 128, num_blocks: int = 3, num_octaves: int = 4, sample_size: int = 1
    ):
        super().__init__()
        self.time = nn.Sequential(Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0), nn.Linear(64, width))
        self.first = nn.Linear(in_channels * (1 + 2 * num_octaves), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(num_blocks)
        )
        self.last = nn.Linear(width, in_channels)
        nn.init.zeros_(self.last.weight)

    def forward(self, sample: Tensor, timestep: Tensor | int, return_dict: bool = True) -> UNet2DOutput | tuple[Tensor]:
        """What the network predicts of x_t.

        Args:
            sample: x_t (B, D, 1, 1).
            timestep: 0..T-1, one or (B,).
            return_dict: Give `.sample` instead of a tuple.
        """
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        hidden, embedded = self.first(self._features(sample.flatten(1))), self.time(times).to(sample.dtype)
        for block in self.blocks:
            hidden = hidden + block(hidden + embedded)
        output = self.last(nn.functional.silu(hidden)).reshape(sample.shape)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _features(self, x: Tensor) -> Tensor:
        """(B, D) coordinates with their sines and cosines, (B, D (1 + 2 octaves))."""
        angles = [x * (math.pi / 2 * 2**octave) for octave in range(self.config.num_octaves)]
        return torch.cat([x, *(part for angle in angles for part in (angle.sin(), angle.cos()))], dim=1)
