"""Any model that can be guided, opened by what its folder or hub id says it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from nrcg.errors import DataError
from nrcg.files import check_hub_id
from nrcg.guidance.pipeline import (
    INDEX,
    LATENT_PARTS,
    PROMPTED,
    GuidedDDPMPipeline,
    PipelineBase,
    parts_of,
    read_index,
)


def pipeline_kind(index: dict[str, Any], path: Path | None = None) -> type[PipelineBase]:
    """The class that opens what a model_index.json describes.

    Raises:
        DataError: a pipeline that nothing here guides.
    """
    if GuidedDDPMPipeline.opens(index):
        return GuidedDDPMPipeline
    if parts_of(index) == LATENT_PARTS:
        from nrcg.guidance.latent import GuidedLDMPipeline

        return GuidedLDMPipeline
    if index["_class_name"] == PROMPTED:
        from nrcg.guidance.prompted import GuidedStableDiffusionPipeline

        return GuidedStableDiffusionPipeline
    where = "" if path is None else f"{path.parent}: "
    allowed = "a U-Net and a scheduler (DDPMPipeline), LDMPipeline, StableDiffusionPipeline"
    raise DataError(f"{where}{index['_class_name']} is not supported; allowed: {allowed}")


def load_pipeline(folder_or_id: str | Path, **kwargs: Any) -> PipelineBase:
    """Any model that can be guided: pixels, latents (LDMPipeline), latents with a prompt (StableDiffusionPipeline).

    Args:
        folder_or_id: A diffusers folder, or an id of the hub.
        kwargs: As of diffusers' from_pretrained.

    Raises:
        DataError: Not there, damaged, or of a kind that is not supported.
    """
    path = Path(folder_or_id) / INDEX
    if Path(folder_or_id).exists():
        return pipeline_kind(read_index(path), path).from_pretrained(folder_or_id, **kwargs)
    check_hub_id(folder_or_id)
    try:
        index = DiffusionPipeline.load_config(str(folder_or_id))
    except Exception as error:
        raise DataError(f"{folder_or_id}: no such folder, and no such diffusers model could be fetched") from error
    return pipeline_kind(index).from_pretrained(folder_or_id, **kwargs)
