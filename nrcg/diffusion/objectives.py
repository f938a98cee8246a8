"""Training objectives: what the network predicts, how its squared error is weighted, and what follows for sampling.

Each objective is a weighted form of one variational bound (arXiv 2507.01516). With x0hat the unclipped one-step
denoised image, the squared error of x_0 is a factor of t times that of what is predicted (`x0_factor`), so that every
weight can be said of any target. A U-Net puts out noise, x_0 or v, as diffusers' schedulers know them (`NATIVE`);
`score` and `mean` are read from its noise and its x_0, and their losses weigh those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nrcg.config import ObjectiveConfig
from nrcg.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """What the U-Net says of x_t, whatever it was trained to predict.

    Attributes:
        eps: the noise, (B, C, H, W) float32.
        log_variance_share: for learned variances, where log Sigma_t lies between the posterior's (0) and beta_t's (1);
            None where the variance is not learned.
        x0: x0hat itself, where the network says it otherwise than by eps: where abar_t is 0, eps does not tell it.
    """

    eps: Tensor
    log_variance_share: Tensor | None = None
    x0: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """The same change of each tensor."""
        parts = (self.eps, self.log_variance_share, self.x0)
        return Prediction(*(None if part is None else change(part) for part in parts))

    @classmethod
    def cat(cls, parts: Sequence[Prediction]) -> Prediction:
        """One of some samples after the other."""
        columns = zip(*((part.eps, part.log_variance_share, part.x0) for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))

    def detach(self) -> Prediction:
        return self.map(Tensor.detach)

    def pred_x0(self, x_t: Tensor, t: Tensor | int, schedule: Schedule, *, clip: bool = False) -> Tensor:
        """x0hat of eq. 5; clip: to [-1, 1]."""
        if self.x0 is None:
            return schedule.pred_x0(x_t, self.eps, t, clip=clip)
        return self.x0.clamp(-1.0, 1.0) if clip else self.x0


def as_prediction(output: Tensor | Prediction) -> Prediction:
    """A Prediction; a tensor is taken for eps."""
    return output if isinstance(output, Prediction) else Prediction(output)


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"""What a scheduler of diffusers can say that the U-Net puts out."""
NATIVE = {kind: kind for kind in PREDICTION_TYPES} | {"score": "epsilon", "mean": "sample"}
"""Target of a training -> what the U-Net puts out."""


def to_eps(output: Tensor, x_t: Tensor, t: Tensor | int, schedule: Schedule, prediction_type: str) -> Tensor:
    """The noise prediction of a U-Net that predicts eps, x_0 (`sample`) or v = sqrt(abar) eps - sqrt(1 - abar) x_0
    (`v_prediction`, Salimans and Ho 2022).

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return output
    abar = schedule.at(t, x_t)
    if prediction_type == "sample":
        return (x_t - abar.sqrt() * output) / (1.0 - abar).sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt() * output + (1.0 - abar).sqrt() * x_t
    raise ValueError(f"prediction_type {prediction_type!r} is not supported; allowed: {', '.join(PREDICTION_TYPES)}")


def to_x0(output: Tensor, x_t: Tensor, t: Tensor | int, schedule: Schedule, prediction_type: str) -> Tensor | None:
    """x0hat, not clipped, of a network that says it without dividing by sqrt(abar), as one of x_0 or v does; None: by
    its eps."""
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        abar = schedule.at(t, x_t)
        return abar.sqrt() * x_t - (1.0 - abar).sqrt() * output
    return None


def target_of(kind: str, x0: Tensor, noise: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """What a network that predicts `kind` should say of x_t, (B, C, H, W).

    Args:
        kind: sample: x_0. epsilon: eps. v_prediction: sqrt(abar) eps - sqrt(1 - abar) x_0. score: the gradient of
            log q(x_t | x_0), -eps / sqrt(1 - abar). mean: that of q(x_{t-1} | x_t, x_0), a_t x_0 + b_t x_t.
        t: one step or (B,) steps, 1..T.

    Raises:
        ValueError: another kind.
    """
    abar = schedule.at(t, x0)
    if kind == "sample":
        return x0
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return abar.sqrt() * noise - (1.0 - abar).sqrt() * x0
    if kind == "score":
        return -noise / (1.0 - abar).sqrt()
    if kind == "mean":
        steps = torch.as_tensor(t).reshape(-1).cpu()
        a, b = (table[steps].reshape(-1, *[1] * (x0.ndim - 1)).to(x0) for table in posterior_factors(schedule))
        return a * x0 + b * schedule.q_sample(x0, t, noise)
    raise ValueError(f"predicts: {kind!r} is unknown; allowed: {', '.join(NATIVE)}")


def posterior_factors(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(a_t, b_t) of the mean of q(x_{t-1} | x_t, x_0), each (T + 1,) float64; 1 and 0 at t = 1, and unused at t = 0."""
    pairs = [(1.0, 0.0), *(schedule.posterior(t)[:2] for t in range(1, schedule.num_steps + 1))]
    return tuple(torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))  # type: ignore


def x0_factor(kind: str, schedule: Schedule) -> Tensor:
    """norm2(x_0 - x0hat)^2 over the squared error of what is predicted, (T + 1,) float64; 0 at t = 0.

    sample 1; epsilon (1 - abar) / abar; v_prediction 1 - abar; score (1 - abar)^2 / abar; mean 1 / a_t^2.

    Raises:
        ValueError: another kind.
    """
    abar = schedule.abar
    factors = {
        "sample": torch.ones_like(abar),
        "epsilon": (1 - abar) / abar,
        "v_prediction": 1 - abar,
        "score": (1 - abar) ** 2 / abar,
        "mean": posterior_factors(schedule)[0] ** -2,
    }
    if kind not in factors:
        raise ValueError(f"predicts: {kind!r} is unknown; allowed: {', '.join(NATIVE)}")
    return torch.cat([torch.zeros(1, dtype=torch.float64), factors[kind][1:]])


def x0_weight(config: ObjectiveConfig, schedule: Schedule) -> Tensor:
    """w_t of a weighting, of the squared error of x_0, (T + 1,) float64, not normalised; 0 at t = 0.

    With SNR = abar / (1 - abar): simple, the target's own squared error; vlb, the bound's (SNR(t-1) - SNR(t)) / 2, at
    t = 1 by the variance at t = 2; snr, SNR; min_snr, min(SNR, gamma) (Hang et al. 2023); p2, SNR / (k + SNR)^gamma
    (Choi et al. 2022); truncated_snr, max(SNR, 1) (Salimans and Ho 2022).
    """
    abar = schedule.abar[1:]
    snr = abar / (1 - abar)
    if config.weighting == "simple":
        weight = 1 / x0_factor(config.predicts, schedule)[1:]
    elif config.weighting == "vlb":
        first = torch.tensor([0.5 / schedule.positive_variance(1)], dtype=torch.float64)
        weight = torch.cat([first, (snr[:-1] - snr[1:]) / 2])
    elif config.weighting == "snr":
        weight = snr
    elif config.weighting == "min_snr":
        weight = snr.clamp(max=config.bound[0])
    elif config.weighting == "p2":
        gamma, k = config.bound
        weight = snr / (k + snr) ** gamma
    else:
        weight = snr.clamp(min=1.0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), weight])


class Objective:
    """A training's loss of what the U-Net puts out.

    Args:
        config: What is predicted, and the weighting.
        schedule: abar_t.
    """

    def __init__(self, config: ObjectiveConfig, schedule: Schedule):
        self.native = NATIVE[config.predicts]
        self.schedule = schedule
        self._weights = loss_weights(config, schedule)

    def losses(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) weighted squared errors, the mean over the pixels."""
        target = target_of(self.native, x0, noise, t, self.schedule)
        errors = (output - target).square().flatten(1).mean(dim=1)
        if self._weights is None:
            return errors
        self._weights = self._weights.to(t.device)
        return errors * self._weights[t]

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The mean of `losses`."""
        if self._weights is None:
            return F.mse_loss(output, target_of(self.native, x0, noise, t, self.schedule))
        return self.losses(output, x0, noise, t).mean()


def loss_weights(config: ObjectiveConfig, schedule: Schedule) -> Tensor | None:
    """Weights of the squared error of what the U-Net puts out, (T + 1,) float32, of mean 1 over t = 1..T.

    None: 1 throughout, such as for epsilon and simple (Ho et al. 2020, eq. 14).
    """
    weight = x0_weight(config, schedule) * x0_factor(NATIVE[config.predicts], schedule)
    weight = weight / weight[1:].mean()
    return None if bool((weight[1:] - 1).abs().max() < 1e-9) else weight.float()
