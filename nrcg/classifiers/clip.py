"""Similarity of images to texts by a CLIP-like model of transformers (Radford et al. 2021), as logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.errors import DataError


class TextSimilarity(nn.Module):
    """Cosines of images to some texts, times the model's temperature: zero-shot logits.

    Args:
        model: CLIPModel or one alike.
        texts: (K, D) features of the texts, of norm one.
    """

    def __init__(self, model: nn.Module, texts: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("texts", texts)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, K) of prepared images (B, C, H, W)."""
        images = F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=1)
        return self.model.logit_scale.exp() * images @ self.texts.to(images.dtype).T


def text_features(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """(K, D) of norm one."""
    length = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
    given = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    wanted = {name: given[name] for name in ("input_ids", "attention_mask") if name in given}
    if len({tuple(row.tolist()) for row in given["input_ids"]}) < len(set(texts)):
        raise DataError("its tokenizer does not tell the texts apart; are its files there?")
    with torch.no_grad():
        return F.normalize(_features(model.get_text_features(**wanted)), dim=1)


def rebuilt(transformers: Any, config: dict[str, Any], shape: tuple[int, int]) -> TextSimilarity:
    """A TextSimilarity of (K, D) texts without its weights, to be filled from a file."""
    settings = dict(config)
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    )
    return TextSimilarity(model, torch.zeros(shape))


def _features(output: Any) -> Tensor:
    """The features of a tower, which newer versions wrap."""
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(found, Tensor):
        raise DataError(f"it gives {type(output).__name__} instead of features")
    return found
