"""Classifiers: the adapter that makes any logits network a guide, our own architectures, saving and loading."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.errors import DataError
from nrcg.files import naming, read_record, sha256_file, temporary_name, write_record
from nrcg.integrity import remedy

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def class_log_prob(logits: Tensor, target: int) -> Tensor:
    """log p(target | x) from logits.

    Args:
        logits: (B, K). K = 1 is binary: the logit of class 1 against class 0.
        target: class index, 0..K-1 (0 or 1 for one logit).

    Returns:
        (B,) log-probabilities: log-softmax at the target, or log-sigmoid of plus or minus the one logit.
    """
    if logits.shape[1] == 1:
        return F.logsigmoid(logits[:, 0] if target == 1 else -logits[:, 0])
    return F.log_softmax(logits, dim=1)[:, target]


def predicted_class(logits: Tensor) -> Tensor:
    """(B,) most likely class of (B, K) logits; one logit means binary."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


class Classifier(nn.Module):
    """An adapter: images in [-1, 1] in, (B, K) logits out, differentiable.

    Args:
        module: gives logits (B, K) as a tensor or an object with `.logits`.
        image_size: the module's input height and width; other sizes are resized (bilinear, antialiased). None: any.
        input_range: the module's value range, such as (0, 1); applied before mean and std.
        mean: per channel, subtracted in that range.
        std: per channel, divided by.
        channels: C of the images that the module takes; None: as many as mean and std have, or any.
        classes: K names, if known.

    Raises:
        ValueError: mean, std and channels do not agree, or std is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        image_size: int | None = None,
        input_range: tuple[float, float] = (-1.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        super().__init__()
        self.module = module
        self.image_size = image_size
        self.input_range = (float(input_range[0]), float(input_range[1]))
        self.mean = None if mean is None else [float(value) for value in mean]
        self.std = None if std is None else [float(value) for value in std]
        self.channels = _agreed_channels(channels, self.mean, self.std)
        self.classes = None if classes is None else list(classes)
        self.rebuild: dict[str, Any] | None = None
        """What makes the module again without its weights, where it came from a SPEC."""
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
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        x = x * self._scale.to(x.dtype) + self._shift.to(x.dtype)
        # Depthwise convolutions run 2 to 3 times faster on a CPU with the channels last, and no slower elsewhere.
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images in [-1, 1] to (B, K) logits."""
        logits = logits_of(self.module(self.prepare(x)))
        if self.groups is None:
            return logits
        if logits.shape[1] == 1:  # binary: softmax of (0, z) is sigmoid(z)
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return torch.stack([logits[:, group].logsumexp(dim=1) for group in self.groups], dim=1)

    def group(self, classes: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
        """Give logits for other classes, each a group of the module's: their probabilities add up, and what belongs to
        no group is left out of the softmax.

        Args:
            classes: the new names.
            groups: for each, positions among the module's classes (0 and 1 where it has one logit).
        """
        self.classes, self.groups = list(classes), [list(group) for group in groups]

    def record(self) -> dict[str, Any]:
        """All of the adapter for `save_classifier`, from which `load_classifier` makes it again."""
        names = ("image_size", "input_range", "mean", "std", "channels")
        return {
            **({"architecture": self.rebuild["architecture"]} if self.rebuild else {}),
            "classes": self.classes,
            "image_size": self.image_size,
            "adapter": {name: getattr(self, name) for name in names},
            "groups": self.groups,
            "rebuild": self.rebuild,
        }

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


def probe(classifier: Callable[[Tensor], Any], x: Tensor) -> int:
    """Try a classifier on images shaped like x (1, C, H, W).

    Returns:
        K, the number of classes; one logit means two.

    Raises:
        ValueError: it cannot take them, gives no (B, K) logits, gives probabilities, or has no gradient.
        TypeError: it gives no tensor.
    """
    ramp = torch.linspace(-1.0, 1.0, x.numel(), device=x.device).reshape(x.shape)
    try:
        with torch.enable_grad():
            seen = torch.cat([torch.zeros_like(x), ramp.to(x.dtype)]).requires_grad_(True)
            logits = logits_of(classifier(seen))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the classifier cannot take images of shape {tuple(x.shape[1:])}: {reason}") from error
    if len(logits) != 2:
        raise ValueError(f"the classifier gave logits of shape {tuple(logits.shape)} for 2 images; expected (2, K)")
    if not logits.requires_grad:
        raise ValueError("the classifier's logits have no gradient with respect to its input")
    found = logits.detach().float()
    if not found.isfinite().all():
        raise ValueError("the classifier's logits are not finite; are its weights?")
    if (
        found.shape[1] > 1
        and (found >= 0).all()
        and torch.allclose(found.sum(dim=1), torch.ones_like(found[:, 0]), atol=1e-4)
    ):
        raise ValueError(
            "the classifier gives probabilities that add up to 1; logits are needed: leave its softmax out"
        )
    return max(found.shape[1], 2)


def logits_of(output: Any) -> Tensor:
    """The logits of a network's output: a tensor or an object with `.logits`.

    Raises:
        TypeError: neither.
        ValueError: not (B, K).
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the classifier gave {type(output).__name__}; expected logits (B, K) or an object with .logits"
        )
    if logits.ndim != 2:
        raise ValueError(f"the classifier gave logits of shape {tuple(logits.shape)}; expected (B, K)")
    return logits


def _last_linear(module: nn.Module) -> nn.Linear:
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linears:
        raise ValueError("the classifier has no linear layer to take features from")
    return linears[-1]


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with batch norm, pooled over the image: a judge that is cheap on a CPU.

    Args:
        num_classes: K.
        width: channels of the first layer; the features before the last linear layer have 2 * width.
    """

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        channels = (3, width, width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for level, (inside, outside) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]
            if level % 2:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, K) logits."""
        return self.head(self.body(x).mean(dim=(2, 3)))


def build_module(architecture: str, num_classes: int, batch_norm_momentum: float) -> nn.Module:
    """A randomly initialised classification network.

    Args:
        architecture: `small_cnn` or the name of a torchvision classification model.
        num_classes: K, the number of logits.
        batch_norm_momentum: share of a batch in the running statistics of batch norm.

    Raises:
        DataError: no such architecture.
    """
    if architecture == "small_cnn":
        module: nn.Module = SmallCNN(num_classes)
    else:
        from torchvision import models

        # get_model would also build detection and segmentation models.
        if architecture not in models.list_models(module=models):
            raise DataError(
                f"architecture {architecture!r} is unknown; allowed: small_cnn or a torchvision model's name"
            )
        module = models.get_model(architecture, weights=None, num_classes=num_classes)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = batch_norm_momentum
    return module


def replace_first_conv(module: nn.Module, in_channels: int, bias: bool) -> None:
    """Give a torchvision MobileNetV3 another first convolution, untrained: for other channels, or with a bias.

    Args:
        module: its first layer is `features[0][0]`; changed in place.
    """
    old = module.features[0][0]
    module.features[0][0] = nn.Conv2d(
        in_channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding, bias=bias
    )


def save_classifier(folder: str | Path, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, then `config.json`.

    Args:
        module: the network; of a `Classifier` its `.module`.
        config: architecture, classes, image_size, and what else one wants to keep (for an adapter,
            `Classifier.record()`); the weights' SHA-256 is added. Two keys are there for networks that differ from
            what `build_module` makes of architecture and classes: `num_logits` (1: binary, the logit of class 1
            against class 0) and `first_conv` (`in_channels`, `bias`).
    """
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / WEIGHTS_FILE)
    try:
        with naming(folder / WEIGHTS_FILE):
            # save_model, not save_file: some networks hold one tensor under two names. Contiguous: safetensors asks.
            save_model(copy.deepcopy(module).to("cpu", memory_format=torch.contiguous_format), str(temporary))
            digest = sha256_file(temporary)
            # Without the old record a kill leaves an unfinished classifier, not a damaged one.
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            temporary.replace(folder / WEIGHTS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    write_record(folder / CONFIG_FILE, {**config, "sha256": digest})


def read_classifier_config(folder: str | Path) -> dict:
    """config.json of a saved classifier. Raises DataError when it is missing or damaged."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = read_record(path)
        if not {"architecture", "classes", "image_size"} <= config.keys():
            raise ValueError("a key is missing")
        return config
    except FileNotFoundError:
        raise DataError(f"{path}: not found; {_remedy(path)}") from None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); {_remedy(path)}") from None


def _remedy(path: Path) -> str:
    return remedy(path, "restore it, or make the classifier anew (see nrcg train-classifier --help)")


def load_classifier(folder: str | Path) -> Classifier:
    """A classifier saved by `save_classifier`, in eval mode, its parameters frozen.

    Images of another size than it was trained on are resized to that.

    Raises:
        DataError: a file is missing, cut off or does not belong to the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from nrcg.diffusion import freeze

    config = read_classifier_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    module = _build(config)
    try:
        load_model(module, path)
        digest = sha256_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; {_remedy(path)}") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged ({reason}); {_remedy(path)}") from None
    if config.get("sha256", digest) != digest:
        raise DataError(f"{path}: damaged (not the weights of {CONFIG_FILE}); {_remedy(path)}")
    adapter = config.get("adapter") or {"image_size": config["image_size"], "channels": config.get("channels", 3)}
    classifier = Classifier(module.to(memory_format=torch.channels_last), **adapter, classes=config["classes"])
    classifier.rebuild = config.get("rebuild")
    if config.get("groups"):
        classifier.group(config["classes"], config["groups"])
    return freeze(classifier)


def _build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a saved classifier, with random weights."""
    if config.get("rebuild"):
        from nrcg import specs

        return specs.build(config["rebuild"])
    num_logits = config.get("num_logits", len(config["classes"]))
    module = build_module(config["architecture"], num_logits, config.get("batch_norm_momentum", 0.1))
    if "first_conv" in config:
        replace_first_conv(module, config["first_conv"]["in_channels"], config["first_conv"]["bias"])
    return module


def class_index(classes: Sequence[str], target: str | int) -> int:
    """A class by name or by number. Raises DataError that lists the classes."""
    text = str(target)
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise DataError(f"target {text!r} is no class of the classifier; allowed: {names} or 0..{len(classes) - 1}")
