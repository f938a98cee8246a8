"""Guided sampling of latents that an autoencoder decodes (Rombach et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import LDMPipeline
from torch import Tensor, nn

from nrcg.devices import floating_type
from nrcg.guidance.pipeline import LATENT_PARTS, PipelineBase, parts_of

if TYPE_CHECKING:
    from nrcg.guidance.guidance import ClassifierGuidance


class LatentPipeline(PipelineBase):
    """Draws latents; the classifier sees the decoded x0hat, and its gradient goes through decoder and U-Net."""

    def decoder(self) -> Any:
        raise NotImplementedError

    def image_shape(self) -> tuple[int, int, int]:
        _, height, width = self.drawn_shape()
        config = self.decoder().config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.out_channels, factor * height, factor * width

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], of latents; differentiable, past a codebook as if it were not there."""
        vae = self.decoder()
        latents = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(latents.to(floating_type(vae)), return_dict=False)[0].to(x.dtype)

    def _prepare(self, guidance: ClassifierGuidance | None) -> None:
        drawn, decoded = self.unet.config.in_channels, self.decoder().config.latent_channels
        if drawn != decoded:
            raise ValueError(f"the U-Net draws latents of {drawn} channels, the autoencoder's have {decoded}")
        super()._prepare(guidance)


class GuidedLDMPipeline(LatentPipeline, LDMPipeline):
    """diffusers' LDMPipeline with classifier guidance and a seed for each sample: an unconditional U-Net of latents,
    and a VQModel or an AutoencoderKL that decodes them."""

    MADE_OF = "an LDMPipeline"

    @classmethod
    def opens(cls, index: dict[str, Any]) -> bool:
        return parts_of(index) == LATENT_PARTS

    def decoder(self) -> nn.Module:
        return self.vqvae
