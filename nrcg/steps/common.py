"""What the steps share: checked data, and what a tracking run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nrcg.data.arrays import load_manifest, verify
from nrcg.pipeline.integrity import Sums


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
