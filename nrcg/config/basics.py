"""Types and choices that the sections of the configuration share."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Role = Literal["non_robust", "robust", "judge"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Input = Literal["pred_x0", "x_t"]
GradMode = Literal["full", "checkpoint", "no_jacobian"]
SamplerName = Literal["model", "ddpm", "ddim", "dpmpp", "euler", "heun", "unipc"]
Start = Literal["standard_normal", "data_mean"]
Target = Literal["sample", "epsilon", "v_prediction", "score", "mean"]
Weighting = Literal["simple", "vlb", "snr", "min_snr", "p2", "truncated_snr"]
Compile = Literal["auto", "on", "off", "graphs"]
WeightsType = Literal["float16", "bfloat16"]
ForwardNoise = Literal["per_image", "per_step"]
Preprocessing = Literal["squash", "center_crop"]
BestBy = Literal["cfid", "fid", "ckid", "kid", "accuracy_judge"]

# The same as tuples, for whoever lists or checks a choice: each is spelled here alone.
ROLES: tuple[str, ...] = get_args(Role)
PRECISIONS: tuple[str, ...] = get_args(Precision)
INPUTS: tuple[str, ...] = get_args(Input)
GRAD_MODES: tuple[str, ...] = get_args(GradMode)
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
STARTS: tuple[str, ...] = get_args(Start)
TARGETS: tuple[str, ...] = get_args(Target)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
COMPILE: tuple[str, ...] = get_args(Compile)
WEIGHTS_TYPES: tuple[str, ...] = get_args(WeightsType)
FORWARD_NOISES: tuple[str, ...] = get_args(ForwardNoise)
PREPROCESSING: tuple[str, ...] = get_args(Preprocessing)
BEST_BY: tuple[str, ...] = get_args(BestBy)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _count_or_auto(value: Any) -> Any:
    # A union's own message would speak of each of its types.
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError(f"{value!r} is not allowed; auto or a whole number >= 1 is")
    return value


def _steps_or_share(value: Any) -> Any:
    if not ((type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1)):
        raise ValueError(f"{value!r} is not allowed; a whole number >= 1 or a share between 0 and 1 is")
    return value


StepCount = Annotated[int | float, BeforeValidator(_steps_or_share)]
"""Sampling steps, or a share of T."""
Count = Annotated[Positive | Literal["auto"], BeforeValidator(_count_or_auto)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
"""A name that becomes a folder and a Snakemake rule."""


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
