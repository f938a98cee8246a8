"""Smoothing of the guidance gradient over the steps of a trajectory (section 2.5 of the paper).

A stabilizer is called once a step with the gradients of a batch, from t = T down to 1, and keeps its state for each
sample apart. `reset` before each batch of trajectories: state carried over would mix in other images' gradients.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from nrcg.config import PUBLISHED_STEPS, STABILIZER_KEYS, StabilizerConfig, scaled_beta


class Stabilizer(ABC):
    """Maps a step's gradients (B, C, H, W) to the ones that guide, of the same shape, in float32."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every trajectory; the next call starts from zero state."""

    @abstractmethod
    def __call__(self, grad: Tensor) -> Tensor: ...


class Identity(Stabilizer):
    """No smoothing."""

    def __repr__(self) -> str:
        return "Identity()"

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
        debias: divide m_t and v_t by 1 - beta^n after n steps (Kingma and Ba 2015, algorithm 1).
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-4, debias: bool = False):
        self.beta1, self.beta2 = _checked_beta("beta1", beta1), _checked_beta("beta2", beta2)
        if not eps > 0:
            raise ValueError(f"eps: {eps} is not positive")
        self.eps = eps
        self.debias = debias
        self.reset()

    def reset(self) -> None:
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        self._steps = 0

    def __call__(self, grad: Tensor) -> Tensor:
        if self._mean is None or self._square is None:
            self._mean, self._square = torch.zeros_like(grad), torch.zeros_like(grad)
        self._mean = self.beta1 * self._mean + (1.0 - self.beta1) * grad
        self._square = self.beta2 * self._square + (1.0 - self.beta2) * grad.square()
        self._steps += 1
        mean, square = self._mean, self._square
        if self.debias:
            mean, square = mean / (1.0 - self.beta1**self._steps), square / (1.0 - self.beta2**self._steps)
        return mean / (square.sqrt() + self.eps)

    def __repr__(self) -> str:
        debias = ", debias=True" if self.debias else ""
        return f"Adam({self.beta1:g}, {self.beta2:g}, eps={self.eps:g}{debias})"


class UnitNorm(Stabilizer):
    """Each sample's gradient at 2-norm one: the scale alone says how far a step goes. A zero gradient stays zero."""

    def reset(self) -> None:
        pass

    def __call__(self, grad: Tensor) -> Tensor:
        scaled, largest = _scaled(grad)
        return scaled / _safe(norms(grad) / largest)

    def __repr__(self) -> str:
        return "UnitNorm()"


class NormClip(Stabilizer):
    """Each sample's gradient at a 2-norm of at most max_norm."""

    def __init__(self, max_norm: float):
        self.max_norm = _checked_positive("max_norm", max_norm)

    def reset(self) -> None:
        pass

    def __call__(self, grad: Tensor) -> Tensor:
        return _clip(grad, self.max_norm)

    def __repr__(self) -> str:
        return f"NormClip({self.max_norm:g})"


class AdaptiveClip(Stabilizer):
    """Each sample's gradient at a 2-norm of at most `factor` times what its own norms were so far.

    In the forward analysis a few images at a few steps have gradients many times the usual, so that the standard
    deviation of the gradient sensitivity is larger than its mean. A fixed bound would need tuning for each classifier;
    a bound that follows the trajectory removes the outliers alone. Meant before an EMA:
    `Chain(AdaptiveClip(), EMA(b))`.

    What the norms were is the larger of two: the moving average of the clipped norms, which one outlier hardly moves,
    and the peak of the norms as they came, which decays by `beta` a step, so that a gradient that goes on being large
    is held back at its first step alone. Only what was measured counts: a gradient of zero (of a classifier that is
    sure, or of a sample that `skip_above` leaves out) changes neither, and the same tensor again (`every_k`) is given
    the same answer.

    Args:
        factor: of the norms so far, > 0.
        beta: momentum of the average and decay of the peak, in [0, 1).
    """

    def __init__(self, factor: float = 2.0, beta: float = 0.9):
        self.factor, self.beta = _checked_positive("factor", factor), _checked_beta("beta", beta)
        self.reset()

    def reset(self) -> None:
        self._average: Tensor | None = None
        self._peak: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is grad:
            return self._last[1]
        norm = norms(grad)
        if self._average is None or self._peak is None:
            self._average, self._peak = torch.zeros_like(norm), torch.zeros_like(norm)
        begun, measured = self._average > 0, norm > 0
        average = torch.where(begun, self._average, norm)  # nothing bounds a sample's first gradient
        clipped = _clip(grad, self.factor * torch.maximum(average, self._peak))
        average = self.beta * average + (1.0 - self.beta) * norms(clipped)
        self._average = torch.where(measured, average, self._average)
        self._peak = torch.where(measured, torch.maximum(self.beta * self._peak, norm), self._peak)
        self._last = (grad, clipped)
        return clipped

    def __repr__(self) -> str:
        return f"AdaptiveClip({self.factor:g}, {self.beta:g})"


class Chain(Stabilizer):
    """Stabilizers one after the other, each fed with the last one's result."""

    def __init__(self, *stabilizers: Stabilizer):
        self.stabilizers = stabilizers

    def reset(self) -> None:
        for stabilizer in self.stabilizers:
            stabilizer.reset()

    def __call__(self, grad: Tensor) -> Tensor:
        for stabilizer in self.stabilizers:
            grad = stabilizer(grad)
        return grad

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.stabilizers))})"


def norms(grad: Tensor) -> Tensor:
    """(B, 1, 1, 1) 2-norm of each sample's gradient (B, C, H, W), however small: squares of 1e-25 are lost in float32,
    so that it is taken of the gradient over its largest value."""
    scaled, largest = _scaled(grad)
    return largest * scaled.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def _scaled(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample over its largest absolute value, and that value (B, 1, 1, 1); a zero gradient over a tiny one."""
    largest = _safe(grad.abs().amax(dim=(1, 2, 3), keepdim=True))
    return grad / largest, largest


def _safe(divisor: Tensor) -> Tensor:
    return divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


def _clip(grad: Tensor, bound: Tensor | float) -> Tensor:
    size, bound = norms(grad), torch.as_tensor(bound, dtype=grad.dtype, device=grad.device)
    return grad * torch.where(size > bound, bound / size, 1.0)


def _checked_positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}: {value} is not positive")
    return float(value)


def _checked_beta(name: str, beta: float) -> float:
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"{name}: {beta} is not in [0, 1)")
    return float(beta)


STABILIZERS: dict[str, Callable[..., Stabilizer]] = {
    "none": Identity,
    "ema": EMA,
    "adam": Adam,
    "adam_debiased": functools.partial(Adam, debias=True),
    "unit_norm": UnitNorm,
    "norm_clip": NormClip,
    "adaptive_clip": AdaptiveClip,
}
"""Name in `config.yaml` and in the shell -> what makes it; its arguments are the name's STABILIZER_KEYS."""
BETAS = ("beta", "beta1", "beta2")
"""Arguments that count steps."""


def from_config(config: StabilizerConfig, num_steps: int) -> Stabilizer:
    """A stabilizer for a trajectory of num_steps steps.

    The config's betas hold at the published 400 steps; here they become beta^(400 / num_steps).

    Raises:
        ValueError: an argument is out of its range, or one's own class cannot be imported or made.
    """
    if config.name == "chain":
        return Chain(*(from_config(part, num_steps) for part in config.of))
    if config.name in STABILIZERS:
        values = {key: getattr(config, key) for key in STABILIZER_KEYS[config.name]}
        scaled = {key: scaled_beta(value, num_steps) for key, value in values.items() if key in BETAS}
        return STABILIZERS[config.name](**values | scaled)
    try:
        return _own_class(config.name)(**(config.arguments or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"stabilizer {config.name!r}: {error}") from None


def parse(spec: str) -> StabilizerConfig:
    """The settings of a stabilizer from the shell, or of several joined by `+`, as in `adaptive_clip+ema:0.99`.

    `none`, `ema:BETA`, `adam[:BETA1,BETA2,EPS]`, `adam_debiased[:...]`, `unit_norm`, `norm_clip:MAX`,
    `adaptive_clip[:FACTOR,BETA]`, or one's own class as `module:Class[:numbers]`. Betas are per step, so that
    `from_config` is to make it for PUBLISHED_STEPS, whatever the number of steps.

    Raises:
        ValueError: anything else.
    """
    parts = [_parse_one(part) for part in spec.split("+")]
    return parts[0] if len(parts) == 1 else StabilizerConfig.model_construct(name="chain", of=parts)


def _parse_one(spec: str) -> StabilizerConfig:
    name, *rest = spec.split(":")
    own = name not in STABILIZERS and bool(rest) and rest[0].isidentifier()
    try:
        if own:
            name = f"{name}:{rest.pop(0)}"
        make = _own_class(name) if own else STABILIZERS[name]
        numbers = [float(part) for part in rest[0].split(",")] if rest else []
        arguments = inspect.signature(make).bind(*numbers)  # where the shell gives none, the class's defaults hold
        arguments.apply_defaults()
        if len(rest) > 1 or not (own or len(numbers) in (0, len(STABILIZER_KEYS[name]))):
            raise KeyError(name)
    except (KeyError, TypeError):
        raise ValueError(
            f"stabilizer {spec!r} is unknown; allowed: none, ema:BETA, adam[:BETA1,BETA2,EPS], adam_debiased[:...], "
            "unit_norm, norm_clip:MAX, adaptive_clip[:FACTOR,BETA], MODULE:CLASS[:NUMBERS]"
        ) from None
    except ValueError as error:
        raise ValueError(f"stabilizer {spec!r}: {error}") from None
    given = dict(arguments.arguments)
    known = {"arguments": given} if own else {key: given[key] for key in STABILIZER_KEYS[name]}
    config = StabilizerConfig.model_construct(name=name, **known)
    try:
        from_config(config, PUBLISHED_STEPS)  # checks the ranges
    except ValueError as error:
        raise ValueError(f"stabilizer {spec!r}: {str(error).removeprefix(f'stabilizer {name!r}: ')}") from None
    return config


def _own_class(path: str) -> Callable[..., Stabilizer]:
    """One's own stabilizer by `module:Class`."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Stabilizer)):
        raise ValueError(f"{module}.{name} is no subclass of nrcg.Stabilizer")
    return found
