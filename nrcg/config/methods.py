"""The section `methods`: what guides, and the sampler."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nrcg.config.basics import Beta, Fraction, GradMode, Input, Positive, SamplerName, Section, StepCount

PUBLISHED_STEPS = 400
"""T of the paper: the number of steps for which `config.yaml` states a stabilizer's betas."""


def scaled_beta(beta: float, num_steps: int) -> float:
    """beta^(400/T): the beta whose window spans the same share of T steps as `beta` does of the
    published 400 (method settings of arXiv 2507.00687, section 3)."""
    return beta ** (PUBLISHED_STEPS / num_steps)


STABILIZER_KEYS = {
    "none": (),
    "ema": ("beta",),
    "adam": ("beta1", "beta2", "eps"),
    "adam_debiased": ("beta1", "beta2", "eps"),
    "unit_norm": (),
    "norm_clip": ("max_norm",),
    "adaptive_clip": ("factor", "beta"),
    "chain": ("of",),
}
"""Keys that each stabilizer needs. One's own class, `module:Class`, takes `arguments` alone."""


class StabilizerConfig(Section):
    """Smoothing of the guidance gradient over the steps. Betas hold at the published 400 steps, so that for T steps the
    code uses beta^(400/T); or per step, with `sampling.betas_per_step`."""

    name: str = Field(
        default="none", description=f"{', '.join(STABILIZER_KEYS)}, or one's own nrcg.Stabilizer as module:Class."
    )
    beta: Beta | None = Field(default=None, description="ema, adaptive_clip: momentum at 400 steps (eq. 7).")
    beta1: Beta | None = Field(default=None, description="adam: first-moment beta at 400 steps (eq. 8).")
    beta2: Beta | None = Field(default=None, description="adam: second-moment beta at 400 steps (eq. 8).")
    eps: Annotated[float, Field(gt=0)] | None = Field(default=None, description="adam: added to the root.")
    max_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="norm_clip: largest 2-norm of a sample's gradient."
    )
    factor: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="adaptive_clip: largest norm as a multiple of the sample's average so far."
    )
    of: Annotated[list[StabilizerConfig], Field(min_length=1)] | None = Field(
        default=None, description="chain: stabilizers, each fed with the last one's result."
    )
    arguments: dict[str, float | str | bool] | None = Field(
        default=None, description="module:Class: keyword arguments, as they are (no beta is scaled)."
    )

    @model_validator(mode="after")
    def _check(self) -> StabilizerConfig:
        own = re.fullmatch(r"[\w.]+:\w+", self.name) is not None
        if self.name not in STABILIZER_KEYS and not own:
            raise ValueError(
                f"name: {self.name!r} is no stabilizer; allowed: {', '.join(STABILIZER_KEYS)} or module:Class"
            )
        needed = () if own else STABILIZER_KEYS[self.name]
        for key in [field for field in type(self).model_fields if field != "name"]:
            given = getattr(self, key) is not None
            if given and key not in needed and not (own and key == "arguments"):
                raise ValueError(f"{key}: stabilizer {self.name!r} has no such key; allowed: {list(needed)}")
            if not given and key in needed:
                raise ValueError(f"{key}: missing; stabilizer {self.name!r} needs {list(needed)}")
        return self


class ScaleScheduleConfig(Section):
    """How the guidance scale changes along a trajectory; the sweep's scale is multiplied by it."""

    name: Literal["constant", "linear", "cosine", "interval", "snr"] = Field(
        default="constant", description="How the factor goes from t = T to t = 0."
    )
    start: Annotated[float, Field(ge=0)] = Field(default=1.0, description="linear, cosine: factor at t = T.")
    end: Annotated[float, Field(ge=0)] = Field(default=1.0, description="linear, cosine: factor at t = 0.")
    low: Fraction = Field(default=0.0, description="interval: guidance where low <= t / T <= high.")
    high: Fraction = Field(default=1.0, description="interval: guidance where low <= t / T <= high.")
    gamma: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="snr: the factor is SNR / (SNR + gamma), with SNR = abar_t / (1 - abar_t)."
    )

    @model_validator(mode="after")
    def _check(self) -> ScaleScheduleConfig:
        if self.low > self.high:
            raise ValueError("low: must not be larger than high")
        used = {"linear": ("start", "end"), "cosine": ("start", "end"), "interval": ("low", "high"), "snr": ("gamma",)}
        for key in ("start", "end", "low", "high", "gamma"):
            if key not in used.get(self.name, ()) and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: the schedule {self.name!r} has no such key")
        return self


class SamplerConfig(Section):
    """The way from x_T to x_0."""

    name: SamplerName = Field(
        default="model", description="model: the scheduler saved with the diffusion model; dpmpp: DPM-Solver++(2M)."
    )
    steps: StepCount | None = Field(
        default=None, description="Sampling steps, or a share of T such as 0.5; null: all T."
    )
    eta: Fraction = Field(default=0.0, description="ddim: share of the ancestral sampler's noise.")

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if self.eta and self.name != "ddim":
            raise ValueError(f"eta: the sampler {self.name!r} has no such key; ddim has")
        return self

    def count(self, num_steps: int) -> int | None:
        """Sampling steps of a chain of T = num_steps; None: all."""
        return max(1, round(self.steps * num_steps)) if isinstance(self.steps, float) else self.steps

    def evaluations(self, num_steps: int) -> int:
        """How often the network is asked for a sample, of a chain of T = num_steps."""
        steps = min(self.count(num_steps) or num_steps, num_steps)
        return 2 * steps - 1 if self.name == "heun" else steps


PRESETS: dict[str, dict[str, Any]] = {"fast": {"sampler": {"name": "ddpm", "steps": 0.5}, "skip_above": 0.9}}
"""Preset -> what it sets; docs/guidance.md says what it costs."""


class MethodConfig(Section):
    """What guides: a classifier, what it sees, how its gradient is taken and smoothed, and the sampler."""

    preset: Literal["fast"] | None = Field(
        default=None,
        description="fast: half of the steps, and no gradient for a sample whose p(target) is above 0.9; the method's "
        "own keys overrule it.",
    )
    classifier: Literal["robust", "non_robust"] | None = Field(
        default=None, description="Guiding classifier; null samples without guidance."
    )
    input: Input = Field(
        default="pred_x0",
        description="The classifier sees the one-step denoised image (eq. 5) or the noisy image.",
    )
    stabilizer: StabilizerConfig = Field(
        default=StabilizerConfig(), description="Smoothing of the guidance gradient over the steps."
    )
    scale_schedule: ScaleScheduleConfig = Field(
        default=ScaleScheduleConfig(), description="Guidance scale along a trajectory."
    )
    grad_mode: GradMode = Field(
        default="full", description="pred_x0: how the gradient passes the U-Net; no_jacobian takes eps for a constant."
    )
    every_k: Positive = Field(default=1, description="A new gradient each k-th step.")
    skip_above: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="No gradient for a sample while its p(target) is above this; 1: always one."
    )
    sampler: SamplerConfig = Field(default=SamplerConfig(), description="The way from x_T to x_0.")

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") not in PRESETS:
            return given
        chosen = PRESETS[given["preset"]]
        if given.get("classifier") is None:
            chosen = {"sampler": chosen["sampler"]}
        return chosen | given

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.classifier is None:
            for key, field in type(self).model_fields.items():
                if key not in ("preset", "classifier", "sampler") and getattr(self, key) != field.default:
                    raise ValueError(f"{key}: guides nothing without a classifier; give robust or non_robust")
        if self.input == "x_t" and self.grad_mode != "full":
            raise ValueError("grad_mode: is about the U-Net, which the gradient passes only with input pred_x0")
        return self


def stabilizer_name(config: StabilizerConfig) -> str:
    """Short name in methods and tables: ema99 for EMA 0.99, adam, none, adaptive_clip_ema99 for a chain."""
    if config.name == "chain":
        return "_".join(stabilizer_name(part) for part in config.of)
    if config.name == "ema":
        return f"ema{f'{config.beta:g}'.removeprefix('0.').ljust(2, '0')}"
    return config.name.rpartition(":")[2]
