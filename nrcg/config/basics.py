"""TODO config.basics."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ROLES = ("non_robust", "robust", "judge")
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _checked_batch_size(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is no batch size; allowed: auto or a whole number >= 1")
    return value


BatchSize = Annotated[Positive | Literal["auto"], BeforeValidator(_checked_batch_size)]


# A name becomes a folder and a Snakemake rule.
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
BestBy = Literal["cfid", "fid", "ckid", "kid", "accuracy_judge"]
Role = Literal["non_robust", "robust", "judge"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


def checked_device(device: str) -> str:
    """A device's name as it is. Raises ValueError for anything else."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", device):
        raise ValueError(f"{device!r} is no device; allowed: auto, cpu, cuda, cuda:N, mps")
    return device


class Section(BaseModel):
    """A part of the configuration. Unknown keys and wrong types are errors, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal settings give equal text, whatever their order in the file."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]
