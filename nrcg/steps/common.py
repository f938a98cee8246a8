"""What the steps share: checked data, what a tracking run says of them, what a model's record says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrcg.config import StepSettings
from nrcg.data.arrays import load_manifest, verify
from nrcg.devices import device_name
from nrcg.pipeline.integrity import Sums
from nrcg.provenance import versions

if TYPE_CHECKING:
    import torch


def checked_data(folder: str | Path) -> dict:
    """A data set's manifest, after its arrays were compared with its checksums. Unchanged files are not read again."""
    verify(folder, sha256=Sums().sha256)
    return load_manifest(folder)


def log_dataset(run: Any, manifest: dict, folder: str | Path, split: str, context: str) -> None:
    """A split as an input of the tracking run."""
    record, size = manifest["splits"][split], manifest["image_size"]
    run.log_dataset(
        name=f"{manifest['name']}/{split}",
        path=Path(folder) / split,
        sha256=record["sha256"]["images"],
        shape=(record["num_images"], size, size, manifest["channels"]),
        classes=manifest["classes"],
        context=context,
    )


def data_tags(manifest: dict) -> dict[str, str]:
    """A data set as tags of a tracking run."""
    return {"dataset": manifest["name"], "dataset_sha256": manifest["splits"]["train"]["sha256"]["images"]}


def identity(settings: StepSettings, manifest: dict) -> str:
    """Everything that shapes a training: the fingerprint of its settings, and the data's checksum."""
    return f"{settings.fingerprint()}-{manifest['splits']['train']['sha256']['images']}"


def model_record(settings: StepSettings, manifest: dict, device: torch.device, precision: torch.dtype) -> dict:
    """What made a model: for its folder."""
    return {
        "settings": settings.model_dump(mode="json"),
        "dataset": data_tags(manifest),
        "device": device_name(device),
        "precision": str(precision).removeprefix("torch."),
        "versions": versions(),
    }


def log_epoch(run: Any, row: dict) -> None:
    """An epoch's row into the log file and the tracking run."""
    print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    run.log_metrics({key: value for key, value in row.items() if key not in ("epoch", "step")}, step=int(row["step"]))
