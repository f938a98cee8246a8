"""Likelihood of images under a DDPM: the variational bound term by term, and the probability-flow ODE.

The bound (Ho et al. 2020, eq. 5; nats per image): L_T + sum over t = 2..T of L_{t-1} + L_0, where
    L_T      = KL(q(x_T | x_0), N(0, I)),
    L_{t-1}  = KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)),
    L_0      = -log p(x_0 | x_1), a Gaussian discretised to the 256 grey values (eq. 13); of data that are not grey
               values (`continuous`) its density.
In bits per dimension: divided by D log 2. x0hat is not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import Prediction, as_prediction
from nrcg.diffusion.schedule import VARIANCES, Schedule

Predict = Callable[[Tensor, int], Tensor | Prediction]
"""(x_t (B, C, H, W), t in 1..T) to eps or a Prediction."""
GREY = 1.0 / 127.5
"""Distance of two of the 256 grey values in [-1, 1]."""


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """L_T (B,) in nats: 1/2 sum_d [abar_T x_0^2 + (1 - abar_T) - log(1 - abar_T) - 1]."""
    abar = float(schedule.abar[-1])
    rest = x0[0].numel() * ((1 - abar) - math.log(1 - abar) - 1)
    return 0.5 * (abar * x0.flatten(1).double().square().sum(dim=1) + rest)


def variance_of(scheduler: Any) -> str:
    """The variance of p(x_{t-1} | x_t) that a diffusers scheduler samples by; VARIANCES are those that are known."""
    return str(scheduler.config.get("variance_type", "fixed_small")).removesuffix("_log")


def log_variance(schedule: Schedule, t: int, kind: str, prediction: Prediction) -> Tensor | float:
    """log Sigma_t of p(x_{t-1} | x_t): a number, or (B, C, H, W) where it is learned; `Schedule.positive_variance`.

    Raises:
        ValueError: Another kind, or a learned variance that the U-Net does not say.
    """
    large = math.log(1.0 - float(schedule.abar[t] / schedule.abar[t - 1]))
    if kind == "fixed_large":
        return large
    small = math.log(schedule.positive_variance(t))
    if kind == "fixed_small":
        return small
    if kind != "learned_range" or prediction.log_variance_share is None:
        raise ValueError(f"variance {kind!r} of a U-Net that says none; allowed: {', '.join(VARIANCES)}")
    return small + prediction.log_variance_share * (large - small)


def transition_term(
    schedule: Schedule,
    x0: Tensor,
    x_t: Tensor,
    t: int,
    prediction: Prediction,
    variance: str = "fixed_small",
    continuous: bool = False,
) -> Tensor:
    """L_{t-1} (B,) in nats, t in 2..T; L_0 at t = 1.

    For the posterior's variance L_{t-1} = norm2(mu_q - mu_theta)^2 / (2 Sigma_t), otherwise the whole divergence.

    Args:
        x0, x_t: (B, C, H, W).
        prediction: of the U-Net at x_t.
        variance: fixed_small, fixed_large or learned_range.
        continuous: the data are no grey values.
    """
    a, _, true_variance = schedule.posterior(t)
    x0hat = schedule.pred_x0(x_t, prediction.eps, t)
    if t == 1 and continuous:
        return density_term(schedule, x0, x0hat)
    spread = log_variance(schedule, t, variance, prediction)
    if t == 1:
        return grey_term(x0, x0hat, spread)
    squares = (a * (x0 - x0hat)).double().square()
    spread = torch.as_tensor(spread, dtype=torch.float64, device=x0.device)
    divergence = spread - math.log(true_variance) - 1 + (true_variance + squares) * torch.exp(-spread)
    return 0.5 * divergence.expand_as(squares).flatten(1).sum(dim=1)


def grey_term(x0: Tensor, mean: Tensor, log_spread: Tensor | float) -> Tensor:
    """-log of a Gaussian's mass in each pixel's grey value, (B,) in nats (Ho et al. 2020, eq. 13).

    Args:
        x0: (B, C, H, W), grey values in [-1, 1]: k / 127.5 - 1.
        mean: of the Gaussian.
        log_spread: log of its variance.
    """
    deviation = torch.exp(0.5 * torch.as_tensor(log_spread, dtype=torch.float64, device=x0.device))
    centred = x0.double() - mean.double()
    upper, lower = (centred + GREY / 2) / deviation, (centred - GREY / 2) / deviation
    # In the tail that is left of the mean, where differences of a normal's distribution do not round to 0.
    swap = (centred > 0).to(centred)
    low, high = torch.where(swap > 0, -upper, lower), torch.where(swap > 0, -lower, upper)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    mass = log_high + torch.log1p(-torch.exp((log_low - log_high).clamp(max=-1e-16)))
    # The darkest and the brightest value hold what lies beyond them.
    mass = torch.where(x0 < -0.999, torch.special.log_ndtr(upper), mass)
    mass = torch.where(x0 > 0.999, torch.special.log_ndtr(-lower), mass)
    return -mass.flatten(1).sum(dim=1)


def density_term(schedule: Schedule, x0: Tensor, mean: Tensor) -> Tensor:
    """-log of the Gaussian's density at x_0, (B,) in nats. Its variance is beta_1: that of x_0 given x_1, where beta_1
    is small beside the data's."""
    variance = 1.0 - float(schedule.abar[1])
    squares = (x0.double() - mean.double()).square().flatten(1).sum(dim=1)
    return 0.5 * (squares / variance + x0[0].numel() * math.log(2 * math.pi * variance))


@dataclass(frozen=True)
class Bound:
    """The bound of some images.

    Attributes:
        nats: (N,) float64, of each image: an estimate where not every t was taken.
        terms: (N, T + 1) float64: L_0 .. L_T; not a number where t was not drawn.
        mse_eps, mse_x0: (N, T + 1) float64, mean squared errors over the pixels, by t; not a number likewise.
        dims: D.
    """

    nats: Tensor
    terms: Tensor
    mse_eps: Tensor
    mse_x0: Tensor
    dims: int

    @property
    def bits_per_dim(self) -> Tensor:
        """(N,) bits per dimension of each image."""
        return self.nats / (self.dims * math.log(2))


def steps_of(num_steps: int, count: int | None, seed: int, samples: Sequence[int]) -> list[list[int]]:
    """For each image the steps t in 2..T whose terms are taken: all, or `count`, one in each of as many equal parts.

    Each t is as likely, so that (T - 1) / count times the sum of the terms taken has no bias; stratified, it varies
    less than with independent draws. Where parts meet within a step, that may be drawn twice.
    """
    whole = list(range(2, num_steps + 1))
    if count is None or count >= len(whole):
        return [whole] * len(samples)
    places = []
    for sample in samples:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + sample) % 2**63)
        draws = torch.rand(count, generator=generator, dtype=torch.float64)
        shares = (torch.arange(count) + draws) / count
        places.append([2 + int(share * len(whole)) for share in shares])
    return places


def bound(
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    samples: Sequence[int],
    *,
    seed: int = 0,
    num_steps: int | None = None,
    variance: str = "fixed_small",
    continuous: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Bound:
    """The bound of images, L_T and L_0 exactly, of the terms between all or a stratified choice.

    Args:
        predict: the U-Net.
        x0: (N, C, H, W), grey values in [-1, 1], or `continuous` data.
        samples: (N,) numbers of the images: noise and choice of t depend on (seed, number, t) alone.
        num_steps: terms per image between 2 and T; None: all.
        variance: of p(x_{t-1} | x_t): fixed_small, fixed_large or learned_range.
        continuous: the data are no grey values: the bound is of their density, and may be negative.
        on_step: called with the number of images that a pass was done for.

    Raises:
        ValueError: grey values outside [-1, 1]; a learned variance that the U-Net does not say.
    """
    if not continuous and bool((x0.abs() > 1).any()):
        raise ValueError("x0: holds values outside [-1, 1]; grey values are k / 127.5 - 1, k = 0..255")
    chosen = steps_of(schedule.num_steps, num_steps, seed, samples)
    shape = (len(x0), schedule.num_steps + 1)
    terms, mse_eps, mse_x0 = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(3))
    terms[:, -1] = prior_term(schedule, x0).cpu()
    sums = torch.zeros(len(x0), dtype=torch.float64)
    for t in sorted({1}.union(*map(set, chosen))):
        # A step that was drawn twice counts twice.
        times = torch.tensor([1 if t == 1 else steps.count(t) for steps in chosen])
        rows = times.nonzero()[:, 0]
        image, numbers = x0[rows.to(x0.device)], [samples[row] for row in rows.tolist()]
        noise = sample_noise(seed, numbers, t, x0.shape[1:], x0.device)
        x_t = schedule.q_sample(image, t, noise)
        with torch.no_grad():
            prediction = as_prediction(predict(x_t, t))
        term = transition_term(schedule, image, x_t, t, prediction, variance, continuous).cpu()
        terms[rows, t - 1] = term
        mse_eps[rows, t] = (prediction.eps - noise).double().square().flatten(1).mean(dim=1).cpu()
        error = (schedule.pred_x0(x_t, prediction.eps, t) - image).double()
        mse_x0[rows, t] = error.square().flatten(1).mean(dim=1).cpu()
        share = 1.0 if t == 1 else (schedule.num_steps - 1) / torch.tensor([len(chosen[row]) for row in rows.tolist()])
        sums[rows] += term * times[rows] * share
        if on_step is not None:
            on_step(len(rows))
    return Bound(terms[:, -1] + sums, terms, mse_eps, mse_x0, x0[0].numel())


def flow_log_density(
    predict: Predict,
    schedule: Schedule,
    x: Tensor,
    *,
    trace: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """log p(x) (B,) in nats of the probability-flow ODE (Song et al. 2021), x taken for x_1.

    In y = x / sqrt(abar) and sigma = sqrt((1 - abar) / abar) the flow is dy/dsigma = eps_theta, and log p changes by
    the divergence of eps_theta in y. Heun's method on the model's own steps t = 1..T, where alone it was trained.

    Args:
        predict: the U-Net, differentiable.
        x: (B, C, H, W).
        trace: (R, B, C, H, W) of random signs, whose quadratic forms estimate the divergence (Hutchinson); None:
            exactly, by D gradients a step.
        on_step: called after each step with its t.
    """
    abar = schedule.abar
    sigma = ((1 - abar) / abar).sqrt()

    def slope(y: Tensor, t: int) -> tuple[Tensor, Tensor]:
        scale = float(abar[t]) ** 0.5
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            eps = as_prediction(predict(y * scale, t)).eps
            return eps.detach(), _divergence(eps, y, trace)

    y = x / float(abar[1]) ** 0.5
    change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    now = slope(y, 1)
    for t in range(1, schedule.num_steps):
        step = float(sigma[t + 1] - sigma[t])
        ahead = slope(y + step * now[0], t + 1)
        y = y + step / 2 * (now[0] + ahead[0])
        at_end = slope(y, t + 1)
        change += step / 2 * (now[1] + at_end[1])
        now = at_end
        if on_step is not None:
            on_step(t + 1)
    dims, end = x[0].numel(), float(abar[-1])
    x_end = (y * end**0.5).flatten(1).double()
    prior = -0.5 * x_end.square().sum(dim=1) - dims / 2 * math.log(2 * math.pi)
    return prior + dims / 2 * (math.log(end) - math.log(float(abar[1]))) + change


def _divergence(eps: Tensor, y: Tensor, trace: Tensor | None) -> Tensor:
    """(B,) float64: sum over d of d eps_d / d y_d, exactly or by quadratic forms of random signs."""
    if trace is not None:
        forms = [
            (torch.autograd.grad(eps, y, signs, retain_graph=True)[0] * signs).flatten(1).double().sum(dim=1)
            for signs in trace
        ]
        return torch.stack(forms).mean(dim=0)
    flat = eps.flatten(1)
    total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for place in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, place].sum(), y, retain_graph=True)
        total += row.flatten(1)[:, place].double()
    return total


def flow_bits_per_dim(
    predict: Predict,
    schedule: Schedule,
    x0: Tensor,
    samples: Sequence[int],
    *,
    seed: int = 0,
    num_traces: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """(B,) bits per dimension of grey images by the flow, uniformly dequantised: an upper bound in expectation.

    Args:
        x0: (B, C, H, W), grey values in [-1, 1].
        samples: (B,) numbers of the images: dequantisation and signs depend on (seed, number) alone.
        num_traces: random signs per image for the divergence.
    """
    dims = x0[0].numel()
    uniform = torch.special.ndtr(sample_noise(seed, samples, 0, x0.shape[1:], x0.device)) - 0.5
    signs = [sample_noise(seed, samples, 1 + r, x0.shape[1:], x0.device).sign() for r in range(num_traces)]
    found = flow_log_density(predict, schedule, x0 + GREY * uniform, trace=torch.stack(signs), on_step=on_step)
    return -(found + dims * math.log(GREY)) / (dims * math.log(2))
