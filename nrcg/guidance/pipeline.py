"""Pipelines of diffusers with classifier guidance, opened from folders and the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline

from nrcg.diffusion.storage import check_pipeline_files, forget_folder, read_data_mean
from nrcg.errors import DataError
from nrcg.files import check_hub_id
from nrcg.guidance.engine import GuidedSampling

INDEX = "model_index.json"
LATENT_PARTS = {"vqvae", "unet", "scheduler"}
"""Components of an LDMPipeline."""
PROMPTED = "StableDiffusionPipeline"
"""Class whose latents are drawn under a prompt."""


class PipelineBase(GuidedSampling):
    """Opens folders and hub ids, and says in one line what is wrong with them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As diffusers'; also reads the mean training image where the folder holds one.

        Raises:
            DataError: a local folder without a pipeline, of another kind, or with damaged files.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.exists():
            cls._check_index(folder / INDEX)
        else:
            check_hub_id(folder)
        check_pipeline_files(folder)
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if not folder.exists():
                raise DataError(f"{folder}: no such folder, and no such diffusers model could be fetched") from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"damaged ({reason})", folder / INDEX) from error
        if folder.exists():
            pipe.data_mean = read_data_mean(folder)
            forget_folder(pipe, pipe.unet)
        pipe.set_progress_bar_config(leave=False)
        return pipe

    MADE_OF = ""
    """What it opens, for messages."""

    @classmethod
    def opens(cls, index: dict[str, Any]) -> bool:
        """Whether this class is for what a model_index.json describes."""
        raise NotImplementedError

    @classmethod
    def _check_index(cls, path: Path) -> None:
        index = read_index(path)
        if not cls.opens(index):
            name = index["_class_name"]
            raise DataError(f"{path.parent}: {name} is not supported here; {cls.__name__} opens {cls.MADE_OF}")


class GuidedDDPMPipeline(PipelineBase, DDPMPipeline):
    """diffusers' DDPMPipeline with classifier guidance and a seed for each sample.

    Opens any folder or hub id of an unconditional model of pixels, in any floating type, whatever its scheduler: those
    of betas, of sigmas and of flow matching that `nrcg.guidance.chains.SUPPORTED` names. Called with guidance=None it
    is the plain model. While it draws, the U-Net is in eval mode with frozen parameters; what it had before is given
    back.
    """

    MADE_OF = "a U-Net and a scheduler (DDPMPipeline)"

    @classmethod
    def opens(cls, index: dict[str, Any]) -> bool:
        return parts_of(index) == {"unet", "scheduler"}


def parts_of(index: dict[str, Any]) -> set[str]:
    """Names of a pipeline's components."""
    return {name for name, entry in index.items() if isinstance(entry, list)}


def read_index(path: Path) -> dict[str, Any]:
    """A model_index.json. Raises DataError: missing or damaged."""
    try:
        index = json.loads(path.read_text())
        return index | {"_class_name": str(index["_class_name"])}
    except FileNotFoundError:
        raise DataError("not found", path) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged ({type(error).__name__}: {error})", path) from None
