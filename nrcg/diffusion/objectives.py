"""What a U-Net predicts (noise, x_0 or v), turned into the noise prediction that sampling and losses use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nrcg.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """What the U-Net says of x_t, whatever it was trained to predict.

    Attributes:
        eps: the noise, (B, C, H, W) float32.
        log_variance_share: for learned variances, where log Sigma_t lies between the posterior's (0) and beta_t's (1);
            None where the variance is not learned.
    """

    eps: Tensor
    log_variance_share: Tensor | None = None

    def detach(self) -> Prediction:
        share = self.log_variance_share
        return Prediction(self.eps.detach(), None if share is None else share.detach())


def as_prediction(output: Tensor | Prediction) -> Prediction:
    """A Prediction; a tensor is taken for eps."""
    return output if isinstance(output, Prediction) else Prediction(output)


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def to_eps(output: Tensor, x_t: Tensor, t: int, schedule: Schedule, prediction_type: str) -> Tensor:
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
