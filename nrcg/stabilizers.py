"""Smoothing of the guidance gradient over the steps of a trajectory (section 2.5 of the paper).

A stabilizer is called once a step with the gradients of a batch, from t = T down to 1, and keeps its state for each
sample apart. `reset` before each batch of trajectories: state carried over would mix in other images' gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nrcg.config import scaled_beta

if TYPE_CHECKING:
    from nrcg.config import StabilizerConfig


class Stabilizer(ABC):
    """Maps a step's gradients (B, C, H, W) to the ones that guide, of the same shape, in float32."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every trajectory; the next call starts from zero state."""

    @abstractmethod
    def __call__(self, grad: Tensor) -> Tensor: ...


class Identity(Stabilizer):
    """No smoothing."""

    def reset(self) -> None:
        pass

    def __call__(self, grad: Tensor) -> Tensor:
        return grad


class EMA(Stabilizer):
    """eq. 7: m_t = beta m_{t+1} + (1 - beta) g_t, from m = 0, without debiasing.

    Args:
        beta: momentum per step, in [0, 1). Its window is 1 / (1 - beta) steps.
    """

    def __init__(self, beta: float):
        self.beta = _checked_beta("beta", beta)
        self.reset()

    def reset(self) -> None:
        self._mean: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        if self._mean is None:
            self._mean = torch.zeros_like(grad)
        self._mean = self.beta * self._mean + (1.0 - self.beta) * grad
        return self._mean

    def __repr__(self) -> str:
        return f"EMA({self.beta:g})"


class Adam(Stabilizer):
    """eq. 8: m_t / (sqrt(v_t) + eps) with the moving averages m_t of g_t and v_t of its square, from 0.

    As published there is no debiasing: the first steps are amplified, up to 6.6 times for (0.9, 0.999).

    Args:
        beta1: momentum of the mean, in [0, 1).
        beta2: momentum of the mean square, in [0, 1).
        eps: added to the root; large against the gradients it turns ADAM into a scaled EMA.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-4):
        self.beta1, self.beta2 = _checked_beta("beta1", beta1), _checked_beta("beta2", beta2)
        if not eps > 0:
            raise ValueError(f"eps: {eps} is not positive")
        self.eps = eps
        self.reset()

    def reset(self) -> None:
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        if self._mean is None or self._square is None:
            self._mean, self._square = torch.zeros_like(grad), torch.zeros_like(grad)
        self._mean = self.beta1 * self._mean + (1.0 - self.beta1) * grad
        self._square = self.beta2 * self._square + (1.0 - self.beta2) * grad.square()
        return self._mean / (self._square.sqrt() + self.eps)

    def __repr__(self) -> str:
        return f"Adam({self.beta1:g}, {self.beta2:g}, eps={self.eps:g})"


def _checked_beta(name: str, beta: float) -> float:
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"{name}: {beta} is not in [0, 1)")
    return float(beta)


def from_config(config: StabilizerConfig, num_steps: int) -> Stabilizer:
    """A stabilizer of `config.yaml` for a trajectory of num_steps steps.

    The config's betas hold at the published 400 steps; here they become beta^(400 / num_steps).
    """
    if config.name == "ema":
        return EMA(scaled_beta(config.beta, num_steps))
    if config.name == "adam":
        return Adam(scaled_beta(config.beta1, num_steps), scaled_beta(config.beta2, num_steps), config.eps)
    return Identity()


def parse(spec: str) -> Stabilizer:
    """A stabilizer from the shell: `none`, `ema:BETA`, `adam` or `adam:BETA1,BETA2,EPS`; betas are per step.

    Raises:
        ValueError: anything else.
    """
    name, _, arguments = spec.partition(":")
    try:
        numbers = [float(part) for part in arguments.split(",")] if arguments else []
        if name == "none" and not numbers:
            return Identity()
        if name == "ema" and len(numbers) == 1:
            return EMA(*numbers)
        if name == "adam" and len(numbers) in (0, 3):
            return Adam(*numbers)
    except ValueError as error:
        raise ValueError(f"stabilizer {spec!r}: {error}") from None
    raise ValueError(f"stabilizer {spec!r} is unknown; allowed: none, ema:BETA, adam, adam:BETA1,BETA2,EPS")
