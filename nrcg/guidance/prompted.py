"""Guided sampling of Stable Diffusion: a classifier beside the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from nrcg.devices import floating_type
from nrcg.diffusion.compiling import Compiled
from nrcg.guidance.engine import GuidedOutput
from nrcg.guidance.latent import LatentPipeline
from nrcg.guidance.pipeline import PROMPTED


@dataclass(frozen=True)
class _Prompt:
    """What a call conditions the U-Net on.

    Attributes:
        embeds: (1, L, D) of the prompt.
        negative: (1, L, D) of what is to be avoided; None without classifier-free guidance.
        scale: w of eps = eps_negative + w (eps_prompt - eps_negative) (Ho and Salimans 2021).
    """

    embeds: Tensor
    negative: Tensor | None
    scale: float


class GuidedStableDiffusionPipeline(LatentPipeline, StableDiffusionPipeline):
    """diffusers' StableDiffusionPipeline with classifier guidance beside the classifier-free one, and a seed for each
    sample. The gradient goes through both of the U-Net's passes, and through the decoder."""

    MADE_OF = "a StableDiffusionPipeline"
    takes_prompt = True
    default_steps = 50
    _prompt: _Prompt | None = None

    @classmethod
    def opens(cls, index: dict[str, Any]) -> bool:
        return index["_class_name"] == PROMPTED

    def decoder(self) -> nn.Module:
        return self.vae

    def __call__(
        self,
        num_samples: int = 1,
        batch_size: Any = 1,
        seed: int = 0,
        guidance: Any = None,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        guidance_scale: float = 7.5,
        num_inference_steps: int | None = 50,
        **others: Any,
    ) -> GuidedOutput:
        """Draw samples of a prompt.

        Args:
            num_samples, batch_size, seed, guidance, num_inference_steps: As of GuidedDDPMPipeline.
            prompt: What the images are of; empty: anything.
            negative_prompt: What they are to be unlike.
            guidance_scale: w of the classifier-free guidance; up to 1 there is none.
            others: As of GuidedDDPMPipeline.

        Raises:
            ValueError, DataError: As GuidedDDPMPipeline.
        """
        if self.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "the U-Net takes the guidance scale as an input (time_cond_proj_dim), which is not supported"
            )
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str):
            raise ValueError("prompt: one text for all samples is needed")
        free = guidance_scale > 1
        with torch.no_grad():
            embeds, negative = self.encode_prompt(prompt, self.device, 1, free, negative_prompt)
        self._prompt = _Prompt(embeds, negative if free else None, guidance_scale)
        try:
            return super().__call__(
                num_samples, batch_size, seed, guidance, num_inference_steps=num_inference_steps, **others
            )
        finally:
            self._prompt = None

    def _forward(self, compiled: Compiled) -> Callable[[Tensor, Tensor], Tensor]:
        network, prompt = self._network(compiled), self._prompt
        if prompt is None:
            raise ValueError("prompt: the U-Net is asked without one")
        dtype = floating_type(self.unet)
        embeds, negative = prompt.embeds.to(dtype), None if prompt.negative is None else prompt.negative.to(dtype)

        def forward(x: Tensor, timesteps: Tensor) -> Tensor:
            count = len(x)
            if negative is None:
                return network(x, timesteps, embeds.expand(count, -1, -1))
            both = torch.cat([negative.expand(count, -1, -1), embeds.expand(count, -1, -1)])
            without, with_prompt = network(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
            return without + prompt.scale * (with_prompt - without)

        return forward

    def _extra_inputs(self) -> tuple[Tensor, ...]:
        return () if self._prompt is None else (self._prompt.embeds.to(floating_type(self.unet)),)

    def _finish(self, x: Tensor) -> Tensor:
        images = super()._finish(x)
        if self.safety_checker is None:
            return images
        with torch.no_grad():
            checked, _ = self.run_safety_checker(images, images.device, images.dtype)
        return checked
