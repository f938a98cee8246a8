"""Shards of samples: an array and, beside it, a record of its checksum and of what made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nrcg.errors import DataError
from nrcg.files import SEAL, read_record, sha256_file
from nrcg.integrity import remedy

RECORD_KEYS = {"first_sample", "nonfinite", "seconds", "peak_memory_mib", "sha256", SEAL}
MADE_BY = {
    "settings": "other settings",
    "weights_sha256": "other weights",
    "method": "another method",
    "scale": "another scale",
}
"""Key of the record -> what is said where it is not as expected."""


def read_shard(path: Path, expected: Mapping[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """A shard's images (N, H, W, C) uint8 and its record.

    Args:
        expected: what must have made it, as far as the caller knows: some of the keys of MADE_BY.

    Raises:
        DataError: one of the files is missing or damaged, they do not belong together, or something else made them.
    """
    again = f"delete it, then run: snakemake {path} --cores all --resources gpu=1"
    try:
        record = read_record(path.with_suffix(".json"))
        absent = RECORD_KEYS - record.keys()
        if absent:
            raise ValueError(f"a key is missing: {', '.join(sorted(absent))}")
        images = np.load(path, allow_pickle=False)
        checksum = sha256_file(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged or without its .json ({error}); {again}") from None
    if record["sha256"] != checksum:
        raise DataError(f"{path}: is not what its .json says (checksum); {again}")
    for key, value in (expected or {}).items():
        if record.get(key) != value:
            raise DataError(f"{path}: was made by {MADE_BY[key]} (its .json: {key}); {again}")
    return images, record


def weights_hash(folder: str | Path) -> str | None:
    """SHA-256 of a model's weights as its own record states it; None for a model without one.

    Raises:
        DataError: the record is damaged.
    """
    for name in ("training.json", "config.json"):
        path = Path(folder) / name
        if path.exists():
            try:
                return read_record(path).get("sha256")
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: damaged ({error}); {remedy(path)}") from None
    return None
