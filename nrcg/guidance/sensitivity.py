"""Forward analysis: how accuracy, logits and gradients of classifiers react to the noise (section 2 of the paper).

Each image has one noise eps, so its x_0..x_T lie on one trajectory. It is walked from t = T down to 0, as sampling
does: one gradient a step and classifier, and the stabilizers see a true trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.classifiers.logits import predicted_class
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import PredictNoise, log_prob_gradient
from nrcg.guidance.stabilizers import Stabilizer

DENOISED = "non_robust_x0"


@dataclass
class _Curves:
    """Per image and step, (N, T + 1); column t holds step t, sensitivities start at t = 1."""

    right: np.ndarray
    logit: np.ndarray
    gradient: np.ndarray

    @classmethod
    def empty(cls, num_images: int, num_steps: int) -> _Curves:
        return cls(*(np.full((num_images, num_steps + 1), np.nan) for _ in range(3)))


def sensitivity(now: Tensor, before: Tensor, distance: Tensor) -> Tensor:
    """eqs. 3, 4 and 6: norm2(f(x_t) - f(x_{t-1})) / norm2(x_t - x_{t-1}) for each image.

    Args:
        now, before: (B, ...) logits or gradients at t and t - 1.
        distance: (B,) norm2(x_t - x_{t-1}).
    """
    return (now - before).flatten(1).norm(dim=1) / distance


def forward_analysis(
    images: Tensor,
    labels: Tensor,
    *,
    classifiers: Mapping[str, nn.Module],
    predict_noise: PredictNoise,
    schedule: Schedule,
    stabilizers: Mapping[str, Stabilizer],
    target: int,
    seed: int,
    batch_size: BatchSize,
    clip_pred_x0: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> list[dict]:
    """Accuracy, logit sensitivity (eq. 3) and gradient sensitivity (eqs. 4 and 6) over t = 1..T.

    Args:
        images: (N, C, H, W) in [-1, 1], on the device to work on.
        labels: (N,) int64.
        classifiers: roles `robust` and `non_robust`; both see x_t, and `non_robust` sees x0hat as `non_robust_x0` too.
        stabilizers: by suffix, each applied to the gradients of `non_robust_x0` (fig. 4).
        target: class whose log-probability is differentiated, as in sampling.
        seed: image i's noise depends on (seed, i) alone.
        batch_size: images at once, changes no result; `auto` takes as many as fit.
        on_step: called after each step with the number done, of images times (T + 1).

    Returns:
        Rows of forward.csv: mean and standard deviation over the images for each method and t.
    """
    methods = [*classifiers, DENOISED, *(f"{DENOISED}_{name}" for name in stabilizers)]
    curves = {name: _Curves.empty(len(images), schedule.num_steps) for name in methods}

    def walk(batch: range) -> None:
        rows = slice(batch.start, batch.stop)
        x0 = images[rows]
        noise = sample_noise(seed, batch, 0, x0.shape[1:], x0.device)
        for stabilizer in stabilizers.values():
            stabilizer.reset()
        later: dict[str, tuple[Tensor, Tensor]] = {}
        x_later = x0
        for t in range(schedule.num_steps, -1, -1):
            x_t = schedule.q_sample(x0, t, noise)
            now = {name: log_prob_gradient(model, target, x_t) for name, model in classifiers.items()}

            def denoise(x: Tensor, t: int = t) -> Tensor:
                if t == 0:
                    return x
                return schedule.pred_x0(x, as_prediction(predict_noise(x, t)).eps, t, clip=clip_pred_x0)

            grad, logits = now[DENOISED] = log_prob_gradient(classifiers["non_robust"], target, x_t, denoise)
            for name, stabilizer in stabilizers.items():
                now[f"{DENOISED}_{name}"] = (stabilizer(grad), logits)
            distance = (x_later - x_t).flatten(1).norm(dim=1)
            for name, (grad, logits) in now.items():
                curves[name].right[rows, t] = (predicted_class(logits) == labels[rows]).cpu()
                if t < schedule.num_steps:
                    grad_later, logits_later = later[name]
                    curves[name].logit[rows, t + 1] = sensitivity(logits_later, logits, distance).cpu()
                    curves[name].gradient[rows, t + 1] = sensitivity(grad_later, grad, distance).cpu()
            later, x_later = now, x_t
            if on_step is not None:
                on_step(batch.start * (schedule.num_steps + 1) + len(batch) * (schedule.num_steps + 1 - t))

    in_batches(len(images), first_batch(batch_size, images.device, images[0, 0].numel()), walk)
    return [row for name in methods for row in _rows(name, curves[name])]


def _rows(method: str, curves: _Curves) -> list[dict]:
    num_images, columns = curves.right.shape
    return [
        {
            "method": method,
            "t": t,
            "num_images": num_images,
            "accuracy": curves.right[:, t].mean(),
            "logit_sensitivity_mean": curves.logit[:, t].mean(),
            "logit_sensitivity_std": curves.logit[:, t].std(),
            "gradient_sensitivity_mean": curves.gradient[:, t].mean(),
            "gradient_sensitivity_std": curves.gradient[:, t].std(),
        }
        for t in range(1, columns)
    ]
