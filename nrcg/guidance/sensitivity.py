"""Forward analysis: how accuracy, logits and gradients of classifiers react to the noise (section 2 of the paper).

`per_image`: each image has one noise eps, so its x_0..x_T lie on one trajectory. It is walked from t = T down to 0, as
sampling does: one gradient a step and classifier, and the stabilizers see a true trajectory.
`per_step`, as the paper's released code: each t has a noise of its own, which x_t and x_{t-1} share, and the gradients
at t and at t - 1 a stabilizer each. Neighbouring steps then have nothing but the image in common; it costs twice as
much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.classifiers.logits import predicted_class
from nrcg.config import FORWARD_NOISES
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import as_prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import PredictNoise, log_prob_gradient
from nrcg.guidance.stabilizers import Stabilizer

DENOISED = "non_robust_x0"


Seen = Mapping[str, tuple[Tensor, Tensor]]
"""Gradient and logits by method."""


@dataclass
class _Curves:
    """Per method, image and step, (N, T + 1); column t holds step t, sensitivities start at t = 1."""

    right: dict[str, np.ndarray]
    logit: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]

    @classmethod
    def empty(cls, methods: Sequence[str], num_images: int, num_steps: int) -> _Curves:
        return cls(*({name: np.full((num_images, num_steps + 1), np.nan) for name in methods} for _ in range(3)))

    def add(self, rows: slice, t: int, now: Seen, before: Seen, distance: Tensor, labels: Tensor) -> None:
        """What is seen of some images at t, and how it differs from t - 1."""
        for name, (grad, logits) in now.items():
            grad_before, logits_before = before[name]
            self.right[name][rows, t] = (predicted_class(logits) == labels[rows]).cpu()
            self.logit[name][rows, t] = sensitivity(logits, logits_before, distance).cpu()
            self.gradient[name][rows, t] = sensitivity(grad, grad_before, distance).cpu()


@dataclass
class _Observer:
    """Gradients and logits of every method at a noisy image."""

    classifiers: Mapping[str, nn.Module]
    predict_noise: PredictNoise
    schedule: Schedule
    target: int
    clip: bool

    def __call__(self, x: Tensor, t: int, stabilizers: Mapping[str, Stabilizer]) -> dict[str, tuple[Tensor, Tensor]]:
        def denoise(x: Tensor) -> Tensor:
            if t == 0:
                return x
            return as_prediction(self.predict_noise(x, t)).pred_x0(x, t, self.schedule, clip=self.clip)

        now = {name: log_prob_gradient(model, self.target, x) for name, model in self.classifiers.items()}
        grad, logits = now[DENOISED] = log_prob_gradient(self.classifiers["non_robust"], self.target, x, denoise)
        for name, stabilizer in stabilizers.items():
            now[f"{DENOISED}_{name}"] = (stabilizer(grad), logits)
        return now


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
    noise: str = "per_image",
    on_step: Callable[[int], None] | None = None,
) -> list[dict]:
    """Accuracy, logit sensitivity (eq. 3) and gradient sensitivity (eqs. 4 and 6) over t = 1..T.

    Args:
        images: (N, C, H, W) in [-1, 1], on the device to work on.
        labels: (N,) int64.
        classifiers: roles `robust` and `non_robust`; both see x_t, and `non_robust` sees x0hat as `non_robust_x0` too.
        stabilizers: by suffix, each applied to the gradients of `non_robust_x0` (fig. 4).
        target: class whose log-probability is differentiated, as in sampling.
        seed: image i's noise depends on (seed, i) alone, with `per_step` on t too.
        batch_size: images at once, changes no result; `auto` takes as many as fit.
        clip_pred_x0: clip x0hat to [-1, 1], as in sampling.
        noise: per_image or per_step; see the module's docstring.
        on_step: called after each step with the number done, of images times T.

    Returns:
        Rows of forward.csv: mean and standard deviation over the images for each method and t.

    Raises:
        ValueError: noise is none of these.
    """
    if noise not in FORWARD_NOISES:
        raise ValueError(f"noise {noise!r} is unknown; allowed: {', '.join(FORWARD_NOISES)}")
    methods = [*classifiers, DENOISED, *(f"{DENOISED}_{name}" for name in stabilizers)]
    num_steps, curves = schedule.num_steps, _Curves.empty(methods, len(images), schedule.num_steps)
    observe = _Observer(classifiers, predict_noise, schedule, target, clip_pred_x0)

    pairs = _along_one_noise if noise == "per_image" else _at_new_noises

    def work(batch: range) -> None:
        rows = slice(batch.start, batch.stop)
        for t, now, before, distance in pairs(images[rows], batch, seed, observe, stabilizers):
            curves.add(rows, t, now, before, distance, labels)
            if on_step is not None:
                on_step(batch.start * num_steps + len(batch) * (num_steps + 1 - t))

    in_batches(len(images), first_batch(batch_size, images.device, images[0, 0].numel()), work)
    return [row for name in methods for row in _rows(name, curves)]


def _along_one_noise(
    x0: Tensor, samples: range, seed: int, observe: _Observer, stabilizers: Mapping[str, Stabilizer]
) -> Iterator[tuple[int, Seen, Seen, Tensor]]:
    """t = T..1, what is seen at t and at t - 1, and norm2(x_t - x_{t-1}) (B,); on one trajectory."""
    eps = sample_noise(seed, samples, 0, x0.shape[1:], x0.device)
    _reset(stabilizers)
    later: Seen = {}
    x_later = x0
    for t in range(observe.schedule.num_steps, -1, -1):
        x_t = observe.schedule.q_sample(x0, t, eps)
        now = observe(x_t, t, stabilizers)
        if later:
            yield t + 1, later, now, (x_later - x_t).flatten(1).norm(dim=1)
        later, x_later = now, x_t


def _at_new_noises(
    x0: Tensor, samples: range, seed: int, observe: _Observer, stabilizers: Mapping[str, Stabilizer]
) -> Iterator[tuple[int, Seen, Seen, Tensor]]:
    """The same, with a noise of its own for each t and stabilizers of their own for t - 1."""
    _reset(stabilizers)
    stabilizers_before = deepcopy(dict(stabilizers))
    for t in range(observe.schedule.num_steps, 0, -1):
        eps = sample_noise(seed, samples, t, x0.shape[1:], x0.device)
        x_t, x_before = (observe.schedule.q_sample(x0, step, eps) for step in (t, t - 1))
        now, before = observe(x_t, t, stabilizers), observe(x_before, t - 1, stabilizers_before)
        yield t, now, before, (x_t - x_before).flatten(1).norm(dim=1)


def _reset(stabilizers: Mapping[str, Stabilizer]) -> None:
    for stabilizer in stabilizers.values():
        stabilizer.reset()


def _rows(method: str, curves: _Curves) -> list[dict]:
    right, logit, gradient = curves.right[method], curves.logit[method], curves.gradient[method]
    num_images, columns = right.shape
    return [
        {
            "method": method,
            "t": t,
            "num_images": num_images,
            "accuracy": right[:, t].mean(),
            "logit_sensitivity_mean": logit[:, t].mean(),
            "logit_sensitivity_std": logit[:, t].std(),
            "gradient_sensitivity_mean": gradient[:, t].mean(),
            "gradient_sensitivity_std": gradient[:, t].std(),
        }
        for t in range(1, columns)
    ]
