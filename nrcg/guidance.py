"""Classifier guidance: the gradient that shifts the reverse process towards a class."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nrcg.classifiers import class_log_prob, logits_of
from nrcg.diffusion import Prediction, Schedule, as_prediction, freeze
from nrcg.schedules import ScaleSchedule
from nrcg.stabilizers import Identity, Stabilizer

PredictNoise = Callable[[Tensor, int], Tensor | Prediction]
"""eps_theta: (x_t (B, C, H, W), t in 1..T) to eps (B, C, H, W) in float32, or to a Prediction."""

GradMode = Literal["full", "checkpoint", "no_jacobian"]
GRAD_MODES: tuple[str, ...] = ("full", "checkpoint", "no_jacobian")


@dataclass(frozen=True)
class GuidedStep:
    """What one step's classifier pass gives.

    Attributes:
        grad: g_t = grad_{x_t} log p(target | .), (B, C, H, W), not smoothed, not scaled.
        prediction: the U-Net's, detached; the sampler goes on with it.
        logits: (B, K) of the classifier, detached.
    """

    grad: Tensor
    prediction: Prediction
    logits: Tensor


def log_prob_gradient(
    classifier: nn.Module, target: int, x: Tensor, see: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """grad_x log p(target | see(x)): of x itself, or through what the classifier is shown (eqs. 4 and 6).

    Args:
        x: (B, C, H, W) float32.
        see: maps x to the classifier's images, differentiably; None shows x itself.

    Returns:
        The gradient (B, C, H, W) in float32 and the logits (B, K), detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        seen = x if see is None else see(x)
        logits = logits_of(classifier(seen)).float()
        # One sum over the batch: no sample's log-probability depends on another's image.
        (grad,) = torch.autograd.grad(class_log_prob(logits, target).sum(), seen)
        if see is not None:
            # Each sample's gradient goes through the U-Net at size one: a float16 U-Net flushes small ones to zero.
            size = grad.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
            grad = torch.autograd.grad(seen, x, grad / size)[0] * size
    return grad.float(), logits.detach()


class ClassifierGuidance:
    """Guides a sampler towards a class by a classifier's gradient (eq. 1, algorithm 1).

    Args:
        classifier: images (B, C, H, W) in [-1, 1] to (B, K) logits, or to an object with `.logits`; one logit means
            binary. Wrap a model that expects other values or sizes in `nrcg.Classifier`. It is put into eval mode
            (batch statistics would couple the samples) and its parameters are frozen.
        target: class index.
        scale: s of eq. 1, >= 0; or a function of the share of the trajectory that is left, t / T in (0, 1], such as
            `nrcg.schedules.Linear(10.0, 0.0)`.
        input: `pred_x0`, the classifier sees the one-step denoised image and the gradient goes through the U-Net
            (eq. 5); or `x_t`, it sees the noisy image, for classifiers that were trained on the noise.
        stabilizer: smooths the gradient over the steps, e.g. `EMA(0.99)`; None smooths nothing.
        clip_pred_x0: clip the image that the classifier sees to [-1, 1]. A clipped pixel's gradient is zero.
        grad_mode: how the gradient of `pred_x0` passes the U-Net. `full` stores its activations; `checkpoint` computes
            them twice and stores less; `no_jacobian` takes the noise prediction for a constant, which is cheap and
            another, rougher gradient.
        every_k: a new gradient each k-th step; between, the stabilizer is fed with the last one.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        classifier: nn.Module,
        target: int,
        scale: float | ScaleSchedule = 1.0,
        input: Literal["pred_x0", "x_t"] = "pred_x0",
        stabilizer: Stabilizer | None = None,
        clip_pred_x0: bool = True,
        grad_mode: GradMode = "full",
        every_k: int = 1,
    ):
        if input not in ("pred_x0", "x_t"):
            raise ValueError(f"input: {input!r} is unknown; allowed: pred_x0, x_t")
        if grad_mode not in GRAD_MODES:
            raise ValueError(f"grad_mode: {grad_mode!r} is unknown; allowed: {', '.join(GRAD_MODES)}")
        if every_k < 1:
            raise ValueError(f"every_k: {every_k} is less than 1")
        if not callable(scale) and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale: {scale} is not a finite number >= 0")
        if target < 0:
            raise ValueError(f"target: {target} is negative")
        self.classifier = freeze(classifier)
        self.target = int(target)
        self.scale = scale if callable(scale) else float(scale)
        self.input = input
        self.stabilizer = stabilizer if stabilizer is not None else Identity()
        self.clip_pred_x0 = clip_pred_x0
        self.grad_mode = grad_mode
        self.every_k = int(every_k)
        self.reset()

    def reset(self) -> None:
        """Forget every trajectory: before each batch of samples."""
        self.stabilizer.reset()
        self._steps = 0
        self._last: GuidedStep | None = None

    def scale_at(self, share_left: float) -> float:
        """s at a share t / T of the trajectory."""
        return float(self.scale(share_left)) if callable(self.scale) else self.scale

    def to(self, device: torch.device) -> ClassifierGuidance:
        """Move the classifier to a device."""
        self.classifier.to(device)
        return self

    def check(self, x: Tensor) -> None:
        """Try the classifier on images shaped like x (B, C, H, W).

        Raises:
            ValueError: it cannot take them, gives no (B, K) logits, has no class `target`, or has no gradient.
        """
        try:
            with torch.enable_grad():
                seen = torch.zeros_like(x[:1]).requires_grad_(True)
                logits = logits_of(self.classifier(seen))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the classifier cannot take images of shape {tuple(x.shape[1:])}: {reason}") from error
        num_classes = max(logits.shape[1], 2)  # one logit means two classes
        if self.target >= num_classes:
            raise ValueError(f"target: {self.target} is no class of the classifier, which has {num_classes}")
        if not logits.requires_grad:
            raise ValueError("the classifier's logits have no gradient with respect to its input")

    def __call__(
        self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule
    ) -> tuple[Prediction, Tensor]:
        """One step of a trajectory: the U-Net's prediction and s * stabilizer(g_t), shaped like x_t.

        Where every_k says so, the last step's gradient is used again.
        """
        if self._last is None or self._steps % self.every_k == 0:
            step = self.gradient(x_t, t, predict_noise, schedule)
            prediction = step.prediction
        else:
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x_t, t))
            step = self._last
        self._steps += 1
        self._last = step
        return prediction, self.scale_at(t / schedule.num_steps) * self.stabilizer(step.grad)

    def gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        """g_t of eq. 1, of x_t itself or through the one-step denoised image (eqs. 5 and 6).

        Args:
            x_t: (B, C, H, W) float32.
            t: step, 1..T.
        """
        if self.input == "x_t":
            with torch.no_grad():
                prediction = as_prediction(predict_noise(x_t, t))
            grad, logits = log_prob_gradient(self.classifier, self.target, x_t)
            return GuidedStep(grad, prediction, logits)
        predicted: list[Prediction] = []

        def one_step_denoised(x: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.grad_mode != "no_jacobian"):
                predicted.append(as_prediction(predict_noise(x, t)))
            x0 = schedule.pred_x0(x, predicted[0].eps, t)
            return x0.clamp(-1.0, 1.0) if self.clip_pred_x0 else x0

        grad, logits = log_prob_gradient(self.classifier, self.target, x_t, one_step_denoised)
        return GuidedStep(grad, predicted[0].detach(), logits)
