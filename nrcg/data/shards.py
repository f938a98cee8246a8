"""Shards of samples: an array and, beside it, a record of its checksum and of what made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrcg.errors import DataError
from nrcg.files import SEAL, atomic_save_array, read_record, sha256_file, write_record
from nrcg.layout import record_of

RECORD_KEYS = {"first_sample", "nonfinite", "seconds", "peak_memory_mib", "sha256", SEAL}
MADE_BY = {
    "settings": "other settings",
    "weights_sha256": "other weights",
    "method": "another method",
    "scale": "another scale",
}
"""Key of the record -> what is said where it is not as expected."""


def write_shard(
    path: Path, images: np.ndarray, record: Mapping[str, Any], trace_path: Path | None = None
) -> dict[str, Any]:
    """Write a shard: the array, then its record beside it.

    Args:
        path: The array's file.
        images: (N, H, W, C) uint8.
        record: What made them; their SHA-256 is added, and that of the trace.
        trace_path: The trace's file, written before.

    Returns:
        The record as written.
    """
    atomic_save_array(path, images)
    sums = {"sha256": sha256_file(path)}
    if trace_path is not None:
        sums["trace_sha256"] = sha256_file(trace_path)
    record = {**record, **sums}
    write_record(record_of(path), record)
    return record


def read_shard(path: Path, expected: Mapping[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """A shard's images (N, H, W, C) uint8 and its record.

    Args:
        expected: what must have made it, as far as the caller knows: some of the keys of MADE_BY.

    Raises:
        DataError: one of the files is missing or damaged, they do not belong together, or something else made them.
    """
    try:
        record = read_record(path.with_suffix(".json"))
        absent = RECORD_KEYS - record.keys()
        if absent:
            raise ValueError(f"a key is missing: {', '.join(sorted(absent))}")
        images = np.load(path, allow_pickle=False)
        checksum = sha256_file(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"damaged or without its .json ({error})", path) from None
    if record["sha256"] != checksum:
        raise DataError("is not what its .json says (checksum)", path)
    for key, value in (expected or {}).items():
        if record.get(key) != value:
            raise DataError(f"was made by {MADE_BY[key]} (its .json: {key})", path)
    return images, record


@dataclass(frozen=True)
class SampleSet:
    """Samples of one method and scale, joined from its shards.

    Attributes:
        images: (N, H, W, C) uint8.
        nonfinite: samples that turned non-finite.
        images_per_second: over all shards.
        peak_memory_mib: the largest shard's.
    """

    images: np.ndarray
    nonfinite: int
    images_per_second: float
    peak_memory_mib: float


def read_samples(folder: Path, num_samples: int, expected: Mapping[str, object] | None = None) -> SampleSet:
    """Join the shards of a setting, checked against their records.

    Args:
        num_samples: expected; shards past them, left by an earlier and larger run, are not read.
        expected: what must have made them (`nrcg.data.shards.read_shard`).

    Raises:
        DataError: a shard or its record is missing, damaged, does not belong to the other, or something else made it.
    """
    paths = sorted(folder.glob("shard*.npy"))
    if not paths:
        raise DataError("not found", folder / "shard0000.npy")
    parts, records = [], []
    for path in paths:
        if sum(map(len, parts)) >= num_samples:
            break
        images, record = read_shard(path, expected)
        parts.append(images)
        records.append(record)
    firsts = [record["first_sample"] for record in records]
    expected = np.cumsum([0, *(len(part) for part in parts[:-1])]).tolist()
    if firsts != expected:
        raise DataError(f"{folder}: its shards begin at samples {firsts}, expected {expected}; delete the folder")
    images = np.concatenate(parts)
    if len(images) != num_samples:
        raise DataError(f"{folder}: its shards hold {len(images)} samples, expected {num_samples}; delete the folder")
    seconds = sum(record["seconds"] for record in records)
    return SampleSet(
        images=images,
        nonfinite=sum(record["nonfinite"] for record in records),
        images_per_second=len(images) / seconds,
        peak_memory_mib=max(record["peak_memory_mib"] for record in records),
    )
