"""A diffusion model on disk: a diffusers pipeline folder with the mean training image and a record of what made it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nrcg.csv_files import write_csv
from nrcg.errors import DataError
from nrcg.files import (
    atomic_save_array,
    naming,
    read_record,
    refuse_pointer,
    replace_folder,
    sha256_file,
    temporary_name,
    write_record,
)

if TYPE_CHECKING:
    from diffusers import ConfigMixin, SchedulerMixin, UNet2DModel

DATA_MEAN_FILE = "data_mean.npy"
"""Mean training image beside a pipeline's weights: (C, H, W) float32 in [-1, 1], for the start `data_mean`."""
RECORD_FILE = "training.json"
"""What made a pipeline's folder, with the checksums of its files."""
WEIGHTS_FILE = "unet/diffusion_pytorch_model.safetensors"


def read_data_mean(folder: str | Path) -> Tensor | None:
    """The mean training image stored with a pipeline, (C, H, W) in [-1, 1], or None where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / DATA_MEAN_FILE
    if not path.exists():
        return None
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot be read ({error})", path) from None


def forget_folder(*parts: ConfigMixin) -> None:
    """Take the folder that a model was opened from out of its config: it says nothing to whom it is saved for."""
    from diffusers.configuration_utils import FrozenDict

    for part in parts:
        part._internal_dict = FrozenDict({key: value for key, value in part.config.items() if key != "_name_or_path"})


def check_pipeline_files(folder: Path) -> None:
    """Compare a pipeline folder with the checksums of its training.json; one without that file passes.

    Args:
        folder: Pipeline in subfolders, or in the old layout with everything at the top.

    Raises:
        DataError: a file has changed, weights are a Git LFS pointer, or training.json is damaged.
    """
    for place in (folder, folder / "unet"):
        for path in place.glob("diffusion_pytorch_model*"):
            refuse_pointer(path)
    record_path = folder / RECORD_FILE
    if not record_path.exists():
        return
    try:
        record = read_record(record_path)
        sums = dict(record.get("files") or {WEIGHTS_FILE: record["sha256"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged ({error})", record_path) from None
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DataError("not found", path)
        if sha256_file(path) != expected:
            raise DataError(f"damaged (not what {RECORD_FILE} says, checksum)", path)


def save_pipeline(
    folder: Path,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    data_mean: np.ndarray,
    record: dict,
    log: list[dict[str, float]],
) -> None:
    """Write a diffusers pipeline folder as a whole, with the mean training image, training.csv and training.json.

    Args:
        folder: Where to write; what is there is replaced.
        unet: Network that predicts the noise.
        scheduler: Scheduler with the betas that it was trained with.
        data_mean: Mean training image, (C, H, W) in [-1, 1].
        record: Settings, data and versions; the weights' SHA-256 is added, and under `files` that of every file.
        log: Rows of training.csv, at least one.
    """
    from diffusers import DDPMPipeline

    new = temporary_name(folder)
    try:
        with naming(folder):
            DDPMPipeline(unet, scheduler).save_pretrained(new)
            atomic_save_array(new / DATA_MEAN_FILE, data_mean.astype(np.float32))
            sums = {path.relative_to(new).as_posix(): sha256_file(path) for path in new.rglob("*") if path.is_file()}
            write_csv(new / "training.csv", log, list(log[0]))
            write_record(new / RECORD_FILE, record | {"sha256": sums[WEIGHTS_FILE], "files": sums})
            replace_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
