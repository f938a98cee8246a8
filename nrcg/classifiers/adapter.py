"""The adapter that makes any network of logits a guide, and the trial that shows whether it can be one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from nrcg.classifiers.logits import logits_of, two_sided
from nrcg.classifiers.preprocessing import Resizing

CHANNEL_ORDERS = ("rgb", "bgr")
TRIAL_SIZE = 64
"""Height and width of the images that a classifier of any size is tried on."""


class Classifier(nn.Module):
    """An adapter: images in [-1, 1] in, (B, K) logits out, differentiable.

    Args:
        module: Network that gives logits (B, K) as a tensor or an object with `.logits`.
        image_size: Input height and width of the module; other sizes are resized (bilinear, antialiased). None: any.
        resizing: How images become that size, where they do otherwise: `Resizing`, or its arguments.
        input_range: Range of the module's input values, such as (0, 1); applied before mean and std.
        mean: What is subtracted in that range, per channel.
        std: What is divided by, per channel.
        channels: C of the images that the module takes; None: as many as mean and std have, or any.
        channel_order: rgb, or bgr for a module that takes blue first; mean and std are in the module's order.
        classes: Names of the K classes, if known.
        rebuild: What makes the module again without its weights (`networks.build`), where it came from a SPEC.

    Attributes:
        groups: For each class, the classes of the module that it stands for (`group`); None: each for itself.

    Raises:
        ValueError: mean, std, channels and channel_order do not agree, or std is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        image_size: int | None = None,
        resizing: Resizing | Mapping[str, Any] | None = None,
        input_range: tuple[float, float] = (-1.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
        channel_order: str = "rgb",
        classes: Sequence[str] | None = None,
        rebuild: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.module = module
        self.image_size = image_size
        self.resizing = Resizing(**resizing) if isinstance(resizing, Mapping) else resizing
        self.input_range = (float(input_range[0]), float(input_range[1]))
        self.mean = None if mean is None else [float(value) for value in mean]
        self.std = None if std is None else [float(value) for value in std]
        self.channels = _agreed_channels(channels, self.mean, self.std)
        if channel_order not in CHANNEL_ORDERS or (channel_order == "bgr" and self.channels not in (3, None)):
            raise ValueError(f"channel_order {channel_order!r} of {self.channels} channels; allowed: rgb, bgr of 3")
        self.channel_order = channel_order
        self.classes = None if classes is None else list(classes)
        self.rebuild = None if rebuild is None else dict(rebuild)
        self.groups: list[list[int]] | None = None
        low, high = self.input_range
        # (x + 1) / 2 * (high - low) + low, then (. - mean) / std, folded into one scale and shift.
        mean_t = torch.tensor(self.mean or [0.0]).reshape(1, -1, 1, 1)
        std_t = torch.tensor(self.std or [1.0]).reshape(1, -1, 1, 1)
        self.register_buffer("_scale", (high - low) / 2 / std_t, persistent=False)
        self.register_buffer("_shift", ((high + low) / 2 - mean_t) / std_t, persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] as the module expects them. Raises ValueError: not its channels."""
        if self.channels is not None and x.shape[1] != self.channels:
            raise ValueError(f"the classifier takes images of {self.channels} channels, not of {x.shape[1]}")
        resizing = self.resizing or (self.image_size and Resizing((self.image_size, self.image_size)))
        if resizing:
            x = resizing(x)
        if self.channel_order == "bgr":
            x = x.flip(1)
        x = x * self._scale.to(x.dtype) + self._shift.to(x.dtype)
        # Depthwise convolutions run 2 to 3 times faster on a CPU with the channels last, and no slower elsewhere.
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K) logits."""
        logits = logits_of(self.module(self.prepare(x)))
        if self.groups is None:
            return logits
        logits = two_sided(logits)
        return torch.stack([logits[:, group].logsumexp(dim=1) for group in self.groups], dim=1)

    def group(self, classes: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
        """Give logits for other classes, each a group of those until now: their probabilities add up, and what belongs
        to no group is left out of the softmax.

        Args:
            classes: New names.
            groups: For each name, positions among the classes until now (0 and 1 where the module has one logit).
        """
        before = self.groups  # of the groups that were given before, the classes that they stand for
        if before is not None:
            groups = [[place for group in merged for place in before[group]] for merged in groups]
        self.classes, self.groups = list(classes), [list(group) for group in groups]

    def settings(self) -> dict[str, Any]:
        """What the module expects of its images, as the constructor takes it."""
        names = ("image_size", "input_range", "mean", "std", "channels", "channel_order")
        resizing = None if self.resizing is None else asdict(self.resizing)
        return {name: getattr(self, name) for name in names} | {"resizing": resizing}

    def record(self) -> dict[str, Any]:
        """All of the adapter for `save_classifier`, from which `open_classifier` makes it again."""
        return {
            **({"architecture": self.rebuild["architecture"]} if self.rebuild else {}),
            "classes": self.classes,
            "image_size": self.image_size,
            "adapter": self.settings(),
            "groups": self.groups,
            "rebuild": self.rebuild,
        }

    def count_classes(self, logits: bool = True) -> int:
        """K, by a trial on one image; of logits, or of other outputs. Raises as `probe` does."""
        size = self.image_size or TRIAL_SIZE
        return probe(self, torch.zeros(1, self.channels or 3, size, size), logits)

    @property
    def feature_dim(self) -> int:
        """D, the width of the last linear layer's input."""
        return _last_linear(self.module).in_features

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features: the input of the last linear layer, (B, D)."""
        caught: list[Tensor] = []
        hook = _last_linear(self.module).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            self.module(self.prepare(x))
        finally:
            hook.remove()
        return caught[0].flatten(1)


def _agreed_channels(channels: int | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> int | None:
    counts = {len(values) for values in (mean, std) if values is not None} - {1}
    if channels is not None:
        counts.add(channels)
    if len(counts) > 1 or not all(value > 0 for value in std or ()):
        raise ValueError(f"channels {channels}, mean {mean} and std {std} do not agree, or a std is not positive")
    return counts.pop() if counts else None


def probe(classifier: Callable[[Tensor], Any], x: Tensor, logits: bool = True) -> int:
    """Try a classifier on images shaped like x (1, C, H, W).

    Args:
        logits: Whether its outputs are to be logits of classes; else any numbers, of a regression or a score.

    Returns:
        K, the number of classes, where one logit means two; or of outputs.

    Raises:
        ValueError: it cannot take them, gives no (B, K) logits, gives probabilities, or has no gradient.
        TypeError: it gives no tensor.
    """
    ramp = torch.linspace(-1.0, 1.0, x.numel(), device=x.device).reshape(x.shape)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            seen = torch.cat([torch.zeros_like(x), ramp.to(x.dtype)]).requires_grad_(True)
            outputs = logits_of(classifier(seen.clone()))
    except (RuntimeError, AssertionError) as error:  # vision transformers assert their size
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the classifier cannot take images of shape {tuple(x.shape[1:])}: {reason}; where it wants another size,"
            " wrap it: nrcg.Classifier(module, image_size=...)"
        ) from error
    if len(outputs) != 2:
        raise ValueError(f"the classifier gave logits of shape {tuple(outputs.shape)} for 2 images; expected (2, K)")
    if not outputs.requires_grad:
        raise ValueError("the classifier's logits have no gradient with respect to its input")
    found = outputs.detach().float()
    if not found.isfinite().all():
        raise ValueError("the classifier's logits are not finite; are its weights?")
    if not logits:
        return found.shape[1]
    if "Sigmoid" in _last_operation(outputs):
        raise ValueError("the classifier gives probabilities, not logits: leave its sigmoid out")
    total = found.sum(dim=1)
    if found.shape[1] > 1 and (found >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise ValueError("the classifier gives probabilities that add up to 1, not logits: leave its softmax out")
    return two_sided(found).shape[1]


def _last_operation(value: Tensor) -> str:
    """Name of the operation that computed a tensor, behind those that only shape or convert it."""
    node = value.grad_fn
    shaping = ("View", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Select", "Slice", "Alias", "Clone", "Expand")
    while node is not None and any(word in node.name() for word in shaping) and node.next_functions:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def _last_linear(module: nn.Module) -> nn.Linear:
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linears:
        raise ValueError("the classifier has no linear layer to take features from")
    return linears[-1]
