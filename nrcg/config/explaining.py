"""Settings of explanations: the kinds, and the knobs of the one engine behind them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from nrcg.config.basics import GRAD_MODES, INPUTS, STARTS, fingerprint

Kind = Literal["counterfactual", "affirmative", "semifactual", "adversarial", "prototype"]
DistanceName = Literal["l1", "l15", "l2", "features"]
Pulling = Literal["proximal", "gradient"]
Search = Literal["none", "tau", "weight"]
Attack = Literal["sign", "gradient"]

KINDS: tuple[str, ...] = get_args(Kind)
DISTANCES: tuple[str, ...] = get_args(DistanceName)
PULLINGS: tuple[str, ...] = get_args(Pulling)
SEARCHES: tuple[str, ...] = get_args(Search)
ATTACKS: tuple[str, ...] = get_args(Attack)
EXPONENTS = {"l1": 1.0, "l15": 1.5, "l2": 2.0}
"""Distance of pixels -> its p."""
OWN_CLASS = ("affirmative", "semifactual")
"""Kinds that aim at the class that the image has already."""


@dataclass(frozen=True)
class ExplainSettings:
    """How explanations are made. `settings_of(kind)` gives each kind's defaults.

    Attributes:
        kind: counterfactual: the target class, near the image. affirmative: back from the counterfactual to the image's
            own class. semifactual: the own class kept while the distance grows. adversarial: pixels alone, without the
            diffusion model. prototype: the target class, whatever the image.
        tau: share of the T steps that the image is noised by, in [0, 1]; 0 leaves it.
        scale: s of the classifier's gradient, >= 0.
        weight: lambda of the distance, in nats at distance 1; negative drives away.
        distance: d(x0hat, x*), one of DISTANCES.
        pull: how the distance acts. proximal: an implicit step of x0hat, stable for any lambda, at no cost. gradient:
            -lambda grad d through x0hat, as published; a step moves x0hat at most as far as it is from x*.
        normalize: each gradient over its 2-norm, times the 2-norm of the step's mean (DVCE).
        stabilizer: of the gradients, as `nrcg.guidance.stabilizers.parse` reads it.
        betas_per_step: the stabilizer's betas hold per step; else at the published 400 steps.
        joint: with pull gradient, one stabilizer for the sum of both gradients; else one for each.
        cone_angle: half-angle of the cone around a robust classifier's gradient, degrees in [0, 90].
        input, clip_pred_x0, grad_mode, every_k, skip_above: as of `nrcg.ClassifierGuidance`; skip_above leaves out the
            classifier's gradient alone, not the distance.
        num_inference_steps: steps of a whole trajectory, of which tau takes the last; None: all T.
        eta: for DDIM.
        start: image: x_tau is the noised image. Others, with tau 1: noise, as in sampling.
        search: tau, weight: for each image, by bisection, the smallest tau, or the largest weight, that still succeeds.
        rounds: most steps of the bisection.
        confidence: what a search takes for success beside the class: at least this probability of it.
        attack: adversarial: sign (L-infinity) or gradient (L2) steps, projected (Madry et al. 2018).
        budget: adversarial: largest change, as a share of the range of pixel values; for `gradient` in the root mean
            square.
        attack_step: adversarial: size of a step, likewise.
        attack_steps: adversarial: most steps; while p(target) is above skip_above none is taken.
        seed: with an image's number gives all of its noise.

    Raises:
        ValueError: a setting is out of its range.
    """

    kind: str = "counterfactual"
    tau: float = 0.8
    scale: float = 15.0
    weight: float = 400.0
    distance: str = "l1"
    pull: str = "proximal"
    normalize: bool = False
    stabilizer: str = "ema:0.99"
    betas_per_step: bool = False
    joint: bool = False
    cone_angle: float = 30.0
    input: str = "pred_x0"
    clip_pred_x0: bool = True
    grad_mode: str = "full"
    every_k: int = 1
    skip_above: float = 1.0
    num_inference_steps: int | None = None
    eta: float = 0.0
    start: str = "image"
    search: str = "none"
    rounds: int = 6
    confidence: float = 0.0
    attack: str = "gradient"
    budget: float = 0.5
    attack_step: float = 8 / 255
    attack_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "distance": DISTANCES, "pull": PULLINGS, "search": SEARCHES, "attack": ATTACKS}
        choices |= {"input": INPUTS, "grad_mode": GRAD_MODES, "start": ("image", "auto", *STARTS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        for name in ("tau", "confidence"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"scale: {self.scale} is not a finite number >= 0")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight: {self.weight} is not a finite number")
        if not 0.0 <= self.cone_angle <= 90.0:
            raise ValueError(f"cone_angle: {self.cone_angle} is not in [0, 90] degrees")
        for name in ("budget", "attack_step", "skip_above"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} is not in (0, 1]")
        if self.rounds < 1 or self.attack_steps < 1:
            raise ValueError(f"rounds, attack_steps: {self.rounds}, {self.attack_steps}; at least 1 is needed")
        self._check_together()

    def _check_together(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        if self.pull == "proximal":
            if self.weight < 0:
                raise ValueError(f"weight: {self.weight} drives away, which pull proximal cannot; pull gradient can")
            if self.distance not in EXPONENTS:
                raise ValueError(f"pull: the distance {self.distance!r} has no proximal step; give gradient")
            if self.joint:
                raise ValueError("joint: pull proximal has no gradient to join; give pull gradient")
        elif self.input == "x_t" and self.weight:
            raise ValueError("pull: the gradient of the distance goes through x0hat, with input pred_x0; give proximal")
        if self.start != "image" and self.tau != 1.0:
            raise ValueError(f"start: {self.start} is noise alone, which needs tau 1, not {self.tau}")
        if self.kind == "adversarial" and self.search != "none":
            raise ValueError("search: an adversarial example has neither tau nor weight")
        if self.search == "weight" and not self.weight:
            raise ValueError("search: weight 0 cannot be searched; give another")

    def fingerprint(self) -> str:
        """Of all settings."""
        return fingerprint(asdict(self))


_LEAST = {"search": "weight", "confidence": 0.9}
KIND_SETTINGS: dict[str, dict[str, Any]] = {
    "counterfactual": _LEAST,
    "affirmative": _LEAST,
    "semifactual": {"pull": "gradient", "distance": "l2", "weight": -100.0, "tau": 0.5},
    "adversarial": {"skip_above": 0.95},
    "prototype": {"tau": 1.0, "weight": 0.0, "start": "auto", "scale": 2.0},
}
"""Kind -> what it sets; chosen on 32 images of the quickstart (docs/explanations.md says how far that carries)."""


def settings_of(kind: str, **changes: Any) -> ExplainSettings:
    """The settings of a kind, with changes laid over them; a change that is None leaves the kind's.

    Raises:
        ValueError: an unknown kind or setting, or one out of its range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    given = {name: value for name, value in changes.items() if value is not None}
    known = [field.name for field in fields(ExplainSettings)]
    for name in given:
        if name not in known:
            raise ValueError(f"{name}: no such setting; allowed: {', '.join(known)}")
    return replace(ExplainSettings(), **{"kind": kind} | KIND_SETTINGS[kind] | given)
