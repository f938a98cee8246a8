"""Classifier guidance: the gradient that shifts the reverse process towards a class."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nrcg.classifiers.adapter import probe
from nrcg.classifiers.logits import logits_of
from nrcg.config import GRAD_MODES, INPUTS, GradMode, Input
from nrcg.devices import floating_type, frozen
from nrcg.diffusion.objectives import Prediction, as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import whole_number
from nrcg.guidance.samplers import Pull
from nrcg.guidance.scales import ScaleSchedule
from nrcg.guidance.stabilizers import Identity, Stabilizer
from nrcg.guidance.targets import AnyTarget, Target, check_class, log_prob_of, target_of

PredictNoise = Callable[[Tensor, int], Tensor | Prediction]
"""eps_theta: (x_t (B, C, H, W), t in 1..T) to eps (B, C, H, W) in float32, or to a Prediction."""

Decode = Callable[[Tensor], Tensor]
"""Latents (B, c, h, w) to images (B, C, H, W), differentiable."""


@dataclass(frozen=True)
class GuidedStep:
    """What one step's classifier pass gives.

    Attributes:
        grad: g_t = grad_{x_t} log p(target | .), (B, C, H, W), not smoothed, not scaled.
        prediction: the U-Net's, detached; the sampler goes on with it.
        logits: (B, K) of the classifier, detached, float32.
    """

    grad: Tensor
    prediction: Prediction
    logits: Tensor


Term = Callable[[Tensor], Tensor]
"""What is differentiated: images (B, C, H, W) to (B,), each sample's number by itself."""


class LogProb:
    """log p(target | x) of a classifier, or what another target says of its outputs, as a term of a gradient.

    Args:
        classifier: images (B, C, H, W) to logits.
        target: class index, each sample's own, (B,), or a Target.

    Attributes:
        logits: (B, K) of the last call, detached, in float32 or float64.
    """

    def __init__(self, classifier: Callable[[Tensor], Any], target: AnyTarget):
        self.classifier, self.target = classifier, target
        self.logits: Tensor | None = None

    def __call__(self, seen: Tensor) -> Tensor:
        logits = logits_of(self.classifier(seen.clone()))  # a copy: some classifiers normalise their input in place
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.logits = logits.detach()
        return log_prob_of(logits, self.target)


def term_gradients(x: Tensor, terms: Sequence[Term], see: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """grad_x term(see(x)) of each term: of x itself, or through what the terms are shown (eqs. 4 and 6).

    The first costs a pass of `see` forward and one backward, each further one a pass backward.

    Args:
        x: (B, C, H, W) float32.
        terms: at least one.
        see: maps x to the images that the terms take, differentiably; None shows x itself.

    Returns:
        A gradient (B, C, H, W) for each, in float32 unless x is float64.
    """
    found = []
    # Also where the caller is in inference mode, which keeps no graph.
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        seen = x if see is None else see(x)
        for left, term in zip(reversed(range(len(terms))), terms, strict=True):
            # One sum over the batch: no sample's term depends on another's image.
            (grad,) = torch.autograd.grad(term(seen).sum(), seen)
            if see is not None:
                # Each sample's gradient goes through the U-Net at size one: a float16 U-Net flushes small ones to zero.
                size = _largest(grad)
                grad = torch.autograd.grad(seen, x, grad / size, retain_graph=left > 0)[0] * size
            found.append(grad.to(torch.promote_types(grad.dtype, torch.float32)))
    return found


def log_prob_gradient(
    classifier: Callable[[Tensor], Tensor],
    target: AnyTarget,
    x: Tensor,
    see: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """grad_x log p(target | see(x)), by `term_gradients`: the gradient (B, C, H, W) and the logits (B, K), detached."""
    term = LogProb(classifier, target)
    (grad,) = term_gradients(x, [term], see)
    return grad, term.logits


class ClassifierGuidance:
    """Guides a sampler towards a class by a classifier's gradient (eq. 1, algorithm 1).

    Args:
        classifier: images (B, C, H, W) in [-1, 1] to (B, K) logits, as `nrcg.classifiers.logits.logits_of` takes them;
            one logit means binary. A module of any floating type, or a function. Wrap a model that expects other values
            or sizes in `nrcg.Classifier`. While it guides it is in eval mode (batch statistics would couple the
            samples) and its parameters are frozen; what it had before is given back.
        target: class index, or name where the classifier has `classes`; several of them, any of which will do; or a
            `nrcg.guidance.targets` Target: a probability, a regression's value, a score.
        scale: s of eq. 1, >= 0; or a function of the share of the trajectory that is left, t / T in (0, 1], such as
            `nrcg.guidance.scales.Linear(10.0, 0.0)`; or, with the attribute `by_abar`, of abar_t, such as
            `SNR(5.0, 1.0)`.
        input: `pred_x0`, the classifier sees the one-step denoised image and the gradient goes through the U-Net
            (eq. 5); or `x_t`, it sees the noisy image, for classifiers that were trained on the noise.
        stabilizer: smooths the gradient over the steps, e.g. `EMA(0.99)`; None smooths nothing.
        clip_pred_x0: clip the image that the classifier sees to [-1, 1]. A clipped pixel's gradient is zero.
        grad_mode: how the gradient of `pred_x0` passes the U-Net. `full` stores its activations; `checkpoint` computes
            them twice and stores less; `no_jacobian` takes the noise prediction for a constant, which is cheap and
            another, rougher gradient.
        every_k: a new gradient each k-th step; between, the stabilizer is fed with the last one.
        skip_above: a probability. While p(target | what the classifier sees) of a sample was above it at the last step,
            that sample's gradient is taken for zero, and its U-Net pass is the cheap one without a gradient:
            grad log p = (1 - p) * grad(logit margin) vanishes as p goes to 1. Decided for each sample by itself, so
            the samples still do not depend on the batch. 1 skips nothing.
        time_conditioned: the classifier takes (images, timesteps (B,) in 0..T-1), as noise-aware classifiers do that
            were trained for guidance (Dhariwal and Nichol 2021); for input `x_t`.

    Attributes:
        last: the GuidedStep of the last gradient.
        fresh: whether the last step took a new gradient (see every_k).
        guide: what the stabilizer made of it, (B, C, H, W), not scaled.
        decode: makes images of what is denoised, where that is latents; a pipeline sets it while it draws. What is
            clipped are the images then.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        classifier: nn.Module | Callable[[Tensor], Any],
        target: str | AnyTarget | Sequence[int | str],
        scale: float | ScaleSchedule = 1.0,
        input: Input = "pred_x0",
        stabilizer: Stabilizer | None = None,
        clip_pred_x0: bool = True,
        grad_mode: GradMode = "full",
        every_k: int = 1,
        skip_above: float = 1.0,
        time_conditioned: bool = False,
    ):
        if input not in INPUTS:
            raise ValueError(f"input: {input!r} is unknown; allowed: {', '.join(INPUTS)}")
        if grad_mode not in GRAD_MODES:
            raise ValueError(f"grad_mode: {grad_mode!r} is unknown; allowed: {', '.join(GRAD_MODES)}")
        every_k = whole_number("every_k", every_k, least=1)
        if not 0.0 < skip_above <= 1.0:
            raise ValueError(f"skip_above: {skip_above} is no probability in (0, 1]")
        if not callable(scale) and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale: {scale} is not a finite number >= 0")
        if skip_above < 1.0 and isinstance(target, Target) and not target.is_probability:
            raise ValueError(f"skip_above: {type(target).__name__} is no probability; it goes with classes")
        if time_conditioned and input != "x_t":
            raise ValueError("time_conditioned: a denoised image has no step; it goes with input x_t")
        self.classifier = classifier
        self.target: AnyTarget = target_of(classifier, target)
        self.scale = scale if callable(scale) else float(scale)
        self.input = input
        self.stabilizer = stabilizer if stabilizer is not None else Identity()
        self.clip_pred_x0 = clip_pred_x0
        self.grad_mode = grad_mode
        self.every_k = every_k
        self.skip_above = float(skip_above)
        self.time_conditioned = time_conditioned
        self.decode: Decode | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every trajectory: before each batch of samples."""
        self.stabilizer.reset()
        self._steps = 0
        self.last: GuidedStep | None = None
        self.guide: Tensor | None = None
        self.fresh = False

    def select(self, places: Sequence[int]) -> None:
        """Say which samples of a run the next batch holds, by their places: for a guidance that differs by sample."""

    def only(self, rows: Tensor) -> contextlib.AbstractContextManager[object]:
        """While it lasts, the batch is these rows of it: for a guidance that differs by sample."""
        return contextlib.nullcontext()

    def acts_at(self, t: int, schedule: Schedule) -> bool:
        """Whether a step is guided at all."""
        return self.scale_at(t, schedule) > 0

    def pull_at(self, t: int, schedule: Schedule) -> Pull | None:
        """What moves the x0hat that the step from t goes to, after the gradient; nothing here."""
        return None

    def scale_at(self, t: int, schedule: Schedule) -> float:
        """s at a step. Raises ValueError: a schedule gives no finite number >= 0."""
        if not callable(self.scale):
            return self.scale
        by_abar = getattr(self.scale, "by_abar", False)
        given = float(schedule.abar[t]) if by_abar else t / schedule.num_steps
        scale = float(self.scale(given))
        if not (math.isfinite(scale) and scale >= 0):
            name = "abar" if by_abar else "t / T"
            raise ValueError(f"scale: the schedule gives {scale} at {name} = {given:g}; a finite number >= 0 is needed")
        return scale

    def to(self, device: torch.device) -> ClassifierGuidance:
        """Move the classifier to a device."""
        if isinstance(self.classifier, nn.Module):
            self.classifier.to(device)
        return self

    def classifier_at(self, t: int) -> Callable[[Tensor], Tensor]:
        """The classifier of images at step t, 1..T; they reach it in its own floating type."""
        classify = self._of_images(t)
        return classify if self.decode is None else lambda x: classify(self._decoded(x))

    def _of_images(self, t: int) -> Callable[[Tensor], Any]:
        dtype = floating_type(self.classifier)

        def classify(x: Tensor) -> Any:
            if not self.time_conditioned:
                return self.classifier(x.to(dtype))
            return self.classifier(x.to(dtype), torch.full((len(x),), t - 1, device=x.device))

        return classify

    @property
    def clips_x0(self) -> bool:
        """Whether x0hat itself is clipped; of latents it is the decoded image."""
        return self.clip_pred_x0 and self.decode is None

    def _decoded(self, x: Tensor) -> Tensor:
        """Images of latents, for the classifier."""
        scaled = _AtSizeOne()
        x = scaled.back(x)
        if self.grad_mode == "checkpoint" and x.requires_grad:
            # Image by image, and computed twice: what is stored is one image's activations.
            images = torch.cat([checkpoint(self.decode, part, use_reentrant=False) for part in x.split(1)])
        else:
            images = self.decode(x)
        images = scaled.down(images)
        return images.clamp(-1.0, 1.0) if self.clip_pred_x0 else images

    def check(self, x: Tensor) -> None:
        """Try the classifier on images shaped like x (B, C, H, W).

        Raises:
            ValueError: it cannot take them, gives no (B, K) logits, has no gradient, or has no class `target`.
            TypeError: it gives no tensor.
        """
        if self.decode is not None:
            with torch.inference_mode(False), torch.enable_grad():
                images = self.decode(x[:1].clone().requires_grad_(True))
            if not images.requires_grad:
                raise ValueError("the decoder's images have no gradient with respect to the latents")
            x = images.detach()
        with frozen(self.classifier):
            if isinstance(self.target, Target):
                self.target.check(probe(self._of_images(1), x[:1], logits=self.target.takes_logits))
            else:
                check_class(int(torch.as_tensor(self.target).max()), probe(self._of_images(1), x[:1]))

    def __call__(
        self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule
    ) -> tuple[Prediction, Tensor]:
        """One step of a trajectory: the U-Net's prediction and s * stabilizer(g_t), shaped like x_t.

        Where every_k says so, the last step's gradient is used again.
        """
        self.fresh = self.last is None or self._steps % self.every_k == 0
        if self.fresh:
            self.last = self._gated_gradient(x_t, t, predict_noise, schedule)
            prediction = self.last.prediction
        else:
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x_t, t))
        self._steps += 1
        return prediction, self._shift(x_t, t, prediction, schedule)

    def _shift(self, x_t: Tensor, t: int, prediction: Prediction, schedule: Schedule) -> Tensor:
        """What the last gradient moves the step by, (B, C, H, W)."""
        self.guide = self.stabilizer(self.last.grad)
        return self.scale_at(t, schedule) * self.guide

    def _gated_gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        """`gradient` of the samples that skip_above lets through; zero, and no gradient's cost, for the others."""
        if self.skip_above == 1.0 or self.last is None:
            return self.gradient(x_t, t, predict_noise, schedule)
        confident = log_prob_of(self.last.logits, self.target) > math.log(self.skip_above)
        doubtful, sure = (~confident).nonzero()[:, 0], confident.nonzero()[:, 0]
        parts = []
        for rows, take in ((doubtful, self.gradient), (sure, self._no_gradient)):
            if len(rows):
                with self.only(rows):
                    parts.append(take(x_t[rows], t, predict_noise, schedule))
        back = torch.cat([doubtful, sure]).argsort()
        return GuidedStep(
            grad=torch.cat([part.grad for part in parts])[back],
            prediction=Prediction.cat([part.prediction for part in parts]).map(lambda whole: whole[back]),
            logits=torch.cat([part.logits for part in parts])[back],
        )

    @torch.no_grad()
    def _no_gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        """A step whose gradient is taken for zero; the logits tell whether that still holds."""
        prediction = as_prediction(predict_noise(x_t, t))
        seen = x_t if self.input == "x_t" else prediction.pred_x0(x_t, t, schedule, clip=self.clips_x0)
        with frozen(self.classifier):
            logits = logits_of(self.classifier_at(t)(seen))
        return GuidedStep(torch.zeros_like(x_t), prediction, logits.float())

    def gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        """g_t of eq. 1, of x_t itself or through the one-step denoised image (eqs. 5 and 6).

        Args:
            x_t: (B, C, H, W) float32.
            t: step, 1..T.
        """
        if self.input == "x_t":
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x_t, t))
            with frozen(self.classifier):
                grad, logits = log_prob_gradient(self.classifier_at(t), self.target, x_t)
            return GuidedStep(grad, prediction, logits)
        see = OneStepDenoised(predict_noise, schedule, t, self.clips_x0, self.grad_mode)
        with frozen(self.classifier):
            grad, logits = log_prob_gradient(self.classifier_at(t), self.target, x_t, see)
        return GuidedStep(grad, see.prediction, logits)


class _AtSizeOne:
    """Lets each sample's gradient pass a part of the graph at size one: half precision flushes small ones to zero."""

    def __init__(self) -> None:
        self._size: Tensor | None = None

    def down(self, output: Tensor) -> Tensor:
        """The part's output, whose gradient is divided by its largest entry."""
        if output.requires_grad:
            output.register_hook(self._divide)
        return output

    def back(self, given: Tensor) -> Tensor:
        """The part's input, whose gradient is multiplied by it again."""
        if not given.requires_grad:
            return given
        given = given.clone()
        given.register_hook(lambda grad: grad * self._size.to(grad.dtype))
        return given

    def _divide(self, grad: Tensor) -> Tensor:
        self._size = _largest(grad)
        return grad / self._size


def _largest(grad: Tensor) -> Tensor:
    """(B, 1, 1, 1) largest entry of each sample's gradient, never 0."""
    return grad.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)


class OneStepDenoised:
    """x0hat(x_t) of eq. 5 as what a gradient goes through.

    Args:
        grad_mode: as of ClassifierGuidance.

    Attributes:
        prediction: the U-Net's of the last call, detached.
    """

    def __init__(self, predict_noise: PredictNoise, schedule: Schedule, t: int, clip: bool, grad_mode: GradMode):
        self._predict, self._schedule, self._t, self._clip, self._mode = predict_noise, schedule, t, clip, grad_mode
        self.prediction: Prediction | None = None

    def __call__(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._mode != "no_jacobian"):
            prediction = as_prediction(self._predict(x, self._t))
        self.prediction = prediction.detach()
        return prediction.pred_x0(x, self._t, self._schedule, clip=self._clip)
