"""What guidance aims at, of what a classifier says: a class, any of several, a probability, a value, a score.

A target maps the outputs (B, K) to a number for each sample, whose gradient guides. A class's is log p(class | x), so
that guidance draws from p(x) p(class | x)^s (eq. 1 of arXiv 2507.00687); the others are the logarithm of another factor
in the place of p(class | x).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from nrcg.classifiers.logits import class_index, class_log_prob, two_sided
from nrcg.errors import DataError, whole_number


class Target(ABC):
    """An aim other than one class."""

    is_probability = False
    """Whether it is the logarithm of a probability, as skip_above needs."""
    takes_logits = True
    """Whether what it reads are logits of classes."""

    @abstractmethod
    def __call__(self, outputs: Tensor) -> Tensor:
        """(B,) what guidance raises, of the classifier's outputs (B, K), float32 or float64."""

    @abstractmethod
    def check(self, count: int) -> None:
        """Raise ValueError where a classifier of `count` outputs (2 for one logit of a binary one) has no such aim."""


@dataclass(frozen=True)
class AnyOf(Target):
    """Any of several classes: log of the sum of their probabilities.

    Attributes:
        classes: Their numbers, each once.
    """

    classes: tuple[int, ...]
    is_probability = True

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"target: {list(self.classes)} are not different classes, at least one")
        for index in self.classes:
            whole_number("target", index)

    def __call__(self, outputs: Tensor) -> Tensor:
        return F.log_softmax(two_sided(outputs), dim=1)[:, list(self.classes)].logsumexp(dim=1)

    def check(self, count: int) -> None:
        check_class(max(self.classes), count)
        if len(self.classes) >= count:
            raise ValueError(f"target: {list(self.classes)} are all of the classifier's {count} classes")


@dataclass(frozen=True)
class Probability(Target):
    """A probability of a class, such as one half for examples at the boundary: -(l - logit(p))^2 / (2 width^2), where l
    is the class's log-odds. As if p had been observed, with a normal error of the log-odds.

    Attributes:
        index: Number of the class.
        probability: p, inside (0, 1).
        width: Standard deviation of the log-odds.
    """

    index: int
    probability: float
    width: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.probability < 1.0:
            raise ValueError(f"target: the probability {self.probability} is not inside (0, 1)")
        whole_number("target", self.index)
        _check_width(self.width)

    def __call__(self, outputs: Tensor) -> Tensor:
        logits = two_sided(outputs)
        others = [index for index in range(logits.shape[1]) if index != self.index]
        odds = logits[:, self.index] - logits[:, others].logsumexp(dim=1)
        wanted = math.log(self.probability) - math.log1p(-self.probability)
        return -((odds - wanted) ** 2) / (2.0 * self.width**2)

    def check(self, count: int) -> None:
        check_class(self.index, count)


@dataclass(frozen=True)
class Value(Target):
    """A value of a regression's output: -(f(x) - value)^2 / (2 width^2), the log-likelihood of an observation with a
    normal error.

    Attributes:
        value: In the output's unit.
        width: Standard deviation of the error.
        output: Number of the output.
    """

    value: float
    width: float = 1.0
    output: int = 0
    takes_logits = False

    def __post_init__(self) -> None:
        whole_number("target: output", self.output)
        _check_width(self.width)
        if not math.isfinite(self.value):
            raise ValueError(f"target: the value {self.value} is not finite")

    def __call__(self, outputs: Tensor) -> Tensor:
        return -((outputs[:, self.output] - self.value) ** 2) / (2.0 * self.width**2)

    def check(self, count: int) -> None:
        if self.output >= count:
            raise ValueError(f"target: output {self.output} is none of the {count}")


@dataclass(frozen=True)
class Score(Target):
    """An output itself: for a module score(x) -> (B,), or one of a network's outputs, such as a similarity to a text.

    Attributes:
        output: Its number.
    """

    output: int = 0
    takes_logits = False

    def __post_init__(self) -> None:
        whole_number("target: output", self.output)

    def __call__(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.output]

    def check(self, count: int) -> None:
        if self.output >= count:
            raise ValueError(f"target: output {self.output} is none of the {count}")


AnyTarget = int | Tensor | Target


def log_prob_of(outputs: Tensor, target: AnyTarget) -> Tensor:
    """(B,) what guidance raises: log p(target | x) of a class, or each sample's own; or as a Target says."""
    return target(outputs) if isinstance(target, Target) else class_log_prob(outputs, target)


def check_class(index: int, count: int) -> None:
    """Raise ValueError where a classifier of `count` classes has no such one."""
    if not 0 <= index < count:
        raise ValueError(f"target: {index} is no class of the classifier, which has {count}")


def target_of(classifier: object, target: object) -> AnyTarget:
    """What a guidance aims at, from what the library's user gives.

    Args:
        classifier: Which may name its `classes`.
        target: A class by number or name, several of them, or a Target.

    Raises:
        ValueError: No class.
        TypeError: None of these.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, list | tuple | set | frozenset):
        return AnyOf(tuple(class_of(classifier, one) for one in target))
    return class_of(classifier, target)


def class_of(classifier: object, target: object) -> int:
    """A class by number, or by name where the classifier says its classes. Raises ValueError."""
    if not isinstance(target, str):
        return whole_number("target", target)
    classes = getattr(classifier, "classes", None)
    if not classes:
        raise ValueError(f"target: {target!r}, but the classifier's classes have no names; give a number")
    return _named(target, classes)


def parse(text: str, classes: Sequence[str] | None) -> AnyTarget:
    """A target of the shell: a class by name or number; several, A|B; a probability, CLASS=P; a regression's value,
    value=V or value=V,WIDTH; a score, `score`. A class of just that name comes first.

    Raises:
        ValueError: None of these.
    """
    if classes and text in classes:
        return list(classes).index(text)
    if text == "score":
        return Score()
    name, is_equation, rest = text.rpartition("=")
    if is_equation:
        try:
            numbers = [float(part) for part in rest.split(",")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 2:
            raise ValueError(f"target: {text!r}; CLASS=P, or value=V or value=V,WIDTH, with numbers, is expected")
        return Value(*numbers) if name == "value" else Probability(_named(name, classes), *numbers)
    several = [_named(part, classes) for part in text.split("|")]
    return several[0] if len(several) == 1 else AnyOf(tuple(several))


def needs_logits(text: str) -> bool:
    """Whether what `parse` makes of a text reads logits of classes."""
    return text != "score" and not text.startswith("value=")


def _named(text: str, classes: Sequence[str] | None) -> int:
    if classes:
        try:
            return class_index(classes, text)
        except DataError as error:
            raise ValueError(str(error)) from None
    if not text.isdecimal():
        raise ValueError(f"target: {text!r}: the classifier's classes have no names; give a number")
    return int(text)


def _check_width(width: float) -> None:
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"target: the width {width} is not a finite number above 0")
