"""Guidance towards a class and an image: s grad log p(target | x0hat) - lambda grad d(x0hat, x*)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nrcg.classifiers.adapter import probe
from nrcg.classifiers.logits import class_log_prob
from nrcg.config.explaining import PULLINGS
from nrcg.devices import floating_type, frozen
from nrcg.diffusion.objectives import Prediction, as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.explain.cone import CONE_ANGLE, checked_angle, cone_projection
from nrcg.explain.distances import Distance
from nrcg.guidance.guidance import (
    ClassifierGuidance,
    GuidedStep,
    LogProb,
    OneStepDenoised,
    PredictNoise,
    term_gradients,
)
from nrcg.guidance.samplers import Pull
from nrcg.guidance.stabilizers import Identity, Stabilizer, UnitNorm, norms


class ExplanationGuidance(ClassifierGuidance):
    """Guides each sample towards its own class and its own image.

    The distance acts in one of two ways. `gradient`: its gradient through x0hat, -lambda grad d(x0hat, x*), shifts the
    step beside the classifier's, as published; since an explicit step of a stiff term overshoots, it moves x0hat at
    most as far as x0hat is from x*. `proximal`: after the classifier's shift the x0hat that the step goes to becomes
    the minimum over z of norm2(z - x0hat)^2 / (2 v_t) + lambda d(z, x*), a backward step (forward-backward splitting),
    stable for any lambda and x* itself as lambda grows. v_t is the variance of x_0 given x_t for independent Gaussian
    pixels of variance prior_std^2; for such data the step is exact: the mean of x_0 given x_t and exp(-lambda d).

    Args:
        classifier: The guide.
        targets: (N,) class index of each sample of a run.
        originals: (N, C, H, W) x*, in [-1, 1].
        distance: d.
        weight: lambda, one for all or (N,); negative, with `gradient`, drives away.
        pull: `proximal` or `gradient`.
        robust: Robust classifier of the same classes, around whose gradient the guide's is projected on a cone.
        cone_angle: Half-angle of the cone, in degrees.
        normalize: Each gradient over its 2-norm before the stabilizer, and times the 2-norm of the step's mean after
            it: g_update of DVCE.
        distance_stabilizer: Smooths the distance's gradient; None smooths nothing.
        joint: One stabilizer, the classifier's, for the sum of both gradients.
        prior_std: Standard deviation of pixels, for v_t.
        settings: As of ClassifierGuidance. With skip_above only the classifier's gradient is left out.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        classifier: nn.Module | Callable[[Tensor], Any],
        targets: Tensor,
        originals: Tensor,
        *,
        distance: Distance,
        weight: float | Tensor = 0.0,
        pull: str = "proximal",
        robust: nn.Module | None = None,
        cone_angle: float = CONE_ANGLE,
        normalize: bool = False,
        distance_stabilizer: Stabilizer | None = None,
        joint: bool = False,
        prior_std: float = 1.0,
        **settings: Any,
    ):
        if pull not in PULLINGS:
            raise ValueError(f"pull: {pull!r} is unknown; allowed: {', '.join(PULLINGS)}")
        weights = torch.as_tensor(weight, dtype=torch.float32).expand(len(originals)).reshape(-1, 1, 1, 1)
        if pull == "proximal" and bool((weights < 0).any()):
            raise ValueError("weight: a negative one drives away, which pull proximal cannot; pull gradient can")
        self.distance, self.robust, self.cone_angle = distance, robust, checked_angle(cone_angle)
        self.normalize, self.joint, self.prior_std = normalize, joint, prior_std
        self.by_gradient = pull == "gradient" and bool((weights != 0).any())
        self.by_prox = pull == "proximal" and bool((weights != 0).any())
        self.distance_stabilizer = distance_stabilizer if distance_stabilizer is not None else Identity()
        self._away: Tensor | None = None
        super().__init__(classifier, 0, **settings)
        if self.input == "x_t" and self.by_gradient:
            raise ValueError("pull: the gradient of the distance goes through x0hat, with input pred_x0; give proximal")
        self._of_run = (torch.as_tensor(targets, dtype=torch.int64), originals, weights)
        self._device = originals.device
        self.select(range(len(originals)))

    def to(self, device: torch.device) -> ExplanationGuidance:
        self._device = device
        self.select(range(len(self._of_run[0])))
        for module in (self.robust, self.distance.module):
            if module is not None:
                module.to(device)
        super().to(device)
        return self

    def check(self, x: Tensor) -> None:
        super().check(x)
        if self.robust is None:
            return
        with frozen(self.classifier, self.robust):
            ours = probe(self.classifier_at(1), x[:1])
            theirs = probe(self._robust, x[:1])
        if ours != theirs:
            raise ValueError(f"robust: has {theirs} classes, the guide {ours}; the same ones are needed")

    def select(self, places: Sequence[int]) -> None:
        rows = torch.as_tensor(places, dtype=torch.int64)
        self._take(*(one[rows.to(one.device)].to(self._device) for one in self._of_run))

    @contextlib.contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        whole = (self.target, self._original, self._weight)
        self._take(*(one[rows] for one in whole))
        try:
            yield
        finally:
            self._take(*whole)

    def _take(self, targets: Tensor, originals: Tensor, weights: Tensor) -> None:
        self.target, self._original, self._weight = targets, originals, weights

    def reset(self) -> None:
        super().reset()
        self.distance_stabilizer.reset()
        self._away = None

    def acts_at(self, t: int, schedule: Schedule) -> bool:
        return self.by_gradient or super().acts_at(t, schedule)

    def pull_at(self, t: int, schedule: Schedule) -> Pull | None:
        """The proximal step of the x0hat that the step from t goes to."""
        if not self.by_prox:
            return None
        abar, prior = float(schedule.abar[t]), self.prior_std**2
        variance = prior * (1.0 - abar) / (abar * prior + 1.0 - abar)
        return lambda x0: self.distance.prox(x0, self._original, variance * self._weight)

    def gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        """The guide's gradient, on the cone and at norm one where asked; keeps the distance's beside it."""
        see = None
        if self.input == "pred_x0":
            see = OneStepDenoised(predict_noise, schedule, t, self.clip_pred_x0, self.grad_mode)
        guide = LogProb(self.classifier_at(t), self.target)
        terms: list[Callable[[Tensor], Tensor]] = [guide]
        if self.robust is not None:
            terms.append(LogProb(self._robust, self.target))
        if self.by_gradient:
            terms.append(lambda seen: self.distance(seen, self._original))
        with frozen(self.classifier, self.robust, self.distance.module):
            towards, *others = term_gradients(x_t, terms, see)
        if self.robust is not None:
            towards = cone_projection(towards, others[0], self.cone_angle)
        self._away = others[-1] if self.by_gradient else None
        if self.normalize:
            unit = UnitNorm()
            towards, self._away = unit(towards), None if self._away is None else unit(self._away)
        if see is not None:
            return GuidedStep(towards, see.prediction, guide.logits)
        with torch.no_grad():
            return GuidedStep(towards, as_prediction(predict_noise(x_t, t)), guide.logits)

    def _gated_gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        before = self.last
        if not self.by_gradient or self.skip_above == 1.0 or before is None:
            return super()._gated_gradient(x_t, t, predict_noise, schedule)
        # The distance's gradient is wanted all the same, so that no pass is saved.
        confident = class_log_prob(before.logits, self.target) > math.log(self.skip_above)
        step = self.gradient(x_t, t, predict_noise, schedule)
        return replace(step, grad=torch.where(confident.reshape(-1, 1, 1, 1), 0.0, step.grad))

    def _shift(self, x_t: Tensor, t: int, prediction: Prediction, schedule: Schedule) -> Tensor:
        scale, towards = self.scale_at(t, schedule), self.last.grad
        x0 = prediction.pred_x0(x_t, t, schedule, clip=self.clip_pred_x0)
        unit = 1.0
        if self.normalize:
            a, b, _ = schedule.posterior(t)
            unit = norms(a * x0 + b * x_t)
        if self._away is None:
            self.guide = self.stabilizer(towards)
            return unit * scale * self.guide
        if self.joint:
            self.guide = self.stabilizer(scale * towards - self._weight * self._away)
            return unit * self.guide
        self.guide = self.stabilizer(towards)
        away = unit * self._weight * self.distance_stabilizer(self._away)
        return unit * scale * self.guide - self._limited(away, x0, t, schedule)

    def _limited(self, away: Tensor, x0: Tensor, t: int, schedule: Schedule) -> Tensor:
        """A shift that moves x0hat at most as far as it is from x*: beyond that an explicit step overshoots."""
        abar = float(schedule.abar[t])
        gap = norms(x0 - self._original) * (math.sqrt(abar) / (1.0 - abar))
        size = norms(away)
        return away * torch.where(size > gap, gap / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)

    def _robust(self, x: Tensor) -> Tensor:
        return self.robust(x.to(floating_type(self.robust)))
