"""Where classification networks come from: torchvision, timm, transformers, one's own module.

A loader gives the network with its weights and what it declares of itself; `build` makes it again without them. No file
is loaded that could execute code: state_dicts are read with weights_only.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.architectures import first_conv, replace_first_conv
from nrcg.errors import DataError
from nrcg.files import refuse_pointer


@dataclass
class Source:
    """A network and what it declares of itself; `rebuild` is what `build` needs to make it without its weights."""

    module: nn.Module
    rebuild: dict[str, Any]
    image_size: int | None = None
    input_range: tuple[float, float] = (-1.0, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    channels: int | None = None
    classes: list[str] | None = None


def build(rebuild: Mapping[str, Any]) -> nn.Module:
    """The network of a `Classifier.rebuild` record, without its weights.

    Raises:
        DataError: the library it comes from is not installed or no longer has it.
    """
    scheme, _, name = rebuild["architecture"].partition(":")
    if scheme in ("torchvision", "timm"):
        module = _untrained(scheme, name, rebuild["num_logits"])
        if conv := rebuild.get("first_conv"):
            replace_first_conv(module, conv["in_channels"], conv["bias"])
        return module
    if scheme == "transformers":
        transformers = _optional("transformers")
        settings = dict(rebuild["transformers_config"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return transformers.AutoModelForImageClassification.from_config(config)
    made = _call_factory(name)
    return made.module if isinstance(made, Classifier) else made


def _load_torchvision(name: str, options: Mapping[str, str]) -> Source:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise DataError(f"torchvision has no classifier {name!r}; `torchvision.models.list_models()` lists them")
    weights = models.get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    if "weights" in options:
        module, rebuild, channels = _with_state("torchvision", name, options)
        classes = None
    else:
        try:
            module = models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise DataError(f"download {weights.url} to {file} ({_reason(error)})") from error
        classes, channels = list(weights.meta["categories"]), 3
        rebuild = {"architecture": f"torchvision:{name}", "num_logits": _num_logits(module.state_dict())}
    return Source(
        module,
        rebuild,
        image_size=transforms.crop_size[0],
        input_range=(0.0, 1.0),
        mean=transforms.mean if channels == 3 else None,
        std=transforms.std if channels == 3 else None,
        channels=channels,
        classes=classes,
    )


def _untrained(scheme: str, name: str, num_logits: int) -> nn.Module:
    """A network of torchvision or timm with random weights."""
    if scheme == "timm":
        return _optional("timm").create_model(name, pretrained=False, num_classes=num_logits)
    from torchvision import models

    # Some towers of auxiliary losses give more than logits, and only while training.
    settings = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, num_classes=num_logits, **settings)


def _with_state(scheme: str, name: str, options: Mapping[str, str]) -> tuple[nn.Module, dict[str, Any], int]:
    """A network of torchvision or timm with the weights of a file, its `rebuild` record, and its images' channels.

    The file says how many logits there are, and whether the first convolution takes other channels or adds a bias.
    """
    state = _read_state(options["weights"], options.get("prefix", ""))
    rebuild: dict[str, Any] = {"architecture": f"{scheme}:{name}", "num_logits": _num_logits(state)}
    module = _untrained(scheme, name, rebuild["num_logits"])
    conv_name, conv = first_conv(module)
    weight, bias = state.get(f"{conv_name}.weight"), f"{conv_name}.bias" in state
    channels = conv.in_channels
    if weight is not None and weight.ndim == 4 and (weight.shape[1], bias) != (channels, conv.bias is not None):
        channels = weight.shape[1]
        rebuild["first_conv"] = {"in_channels": channels, "bias": bias}
        replace_first_conv(module, channels, bias)
    _load_state(module, state, options["weights"])
    return module, rebuild, channels


def _load_timm(name: str, options: Mapping[str, str]) -> Source:
    timm = _optional("timm")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        raise DataError(f"timm has no model {name!r}; `timm.list_models()` lists them")
    if "weights" in options:
        module, rebuild, channels = _with_state("timm", name, options)
    else:
        try:
            module = timm.create_model(name, pretrained=True)
        except Exception as error:  # of whichever library fetches it
            raise DataError(f"its weights cannot be fetched ({_reason(error)}); give ?weights=FILE") from error
        rebuild, channels = {"architecture": f"timm:{name}", "num_logits": module.num_classes}, None
    data = timm.data.resolve_model_data_config(module)
    own = channels in (None, data["input_size"][0])
    return Source(
        module,
        rebuild,
        image_size=data["input_size"][1],
        input_range=(0.0, 1.0),
        mean=data["mean"] if own else None,
        std=data["std"] if own else None,
        channels=data["input_size"][0] if own else channels,
        classes=_timm_classes(module),
    )


def _timm_classes(module: nn.Module) -> list[str] | None:
    names = module.pretrained_cfg.get("label_names")
    return list(names) if names is not None and len(names) == module.num_classes else None


def _load_transformers(name: str, options: Mapping[str, str]) -> Source:
    transformers = _optional("transformers")
    if "weights" in options:
        raise DataError("option weights: a transformers folder holds its own")
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise DataError(f"{name}: holds no config.json of a transformers model")
    try:
        module, info = transformers.AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # of whichever library fetches or opens it
        raise DataError(f"no image classifier can be opened from it ({_reason(error)})") from error
    if info["missing_keys"]:
        raise DataError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}, which would stay random")
    settings = _read_preprocessor(name)
    labels = module.config.id2label
    return Source(
        module,
        {
            "architecture": f"transformers:{name}",
            "num_logits": len(labels),
            "transformers_config": module.config.to_dict(),
        },
        image_size=_side(settings) or _int(getattr(module.config, "image_size", None)),
        input_range=(0.0, 255.0 * settings.get("rescale_factor", 1 / 255))
        if settings.get("do_rescale", True)
        else (0, 255),
        mean=settings.get("image_mean") if settings.get("do_normalize", True) else None,
        std=settings.get("image_std") if settings.get("do_normalize", True) else None,
        channels=_int(getattr(module.config, "num_channels", None)),
        classes=[str(labels[index]) for index in range(len(labels))],
    )


def _read_preprocessor(name: str) -> dict:
    """preprocessor_config.json of a folder or hub id; what most models assume where there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "preprocessor_config.json")
        return json.loads(Path(path).read_text())
    except (OSError, TypeError, ValueError) as error:
        raise DataError(
            f"its preprocessor_config.json cannot be read ({_reason(error)}); it tells the range and size of the images"
        ) from error


def _side(settings: Mapping[str, Any]) -> int | None:
    """Side of the square image that a preprocessor makes."""
    for key in ("crop_size", "size") if settings.get("do_center_crop") else ("size",):
        size = settings.get(key)
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return size.get("height") or size.get("shortest_edge")
    return None


def _load_python(name: str, options: Mapping[str, str]) -> Source:
    made = _call_factory(name)
    if isinstance(made, Classifier):
        if set(options) - {"weights", "prefix", "classes"}:
            raise DataError("the factory gives an nrcg.Classifier, which says itself what it expects; drop the options")
        source = Source(
            made.module,
            {"architecture": f"python:{name}", "num_logits": None},
            made.image_size,
            made.input_range,
            made.mean,
            made.std,
            made.channels,
            made.classes,
        )
    else:
        source = Source(made, {"architecture": f"python:{name}", "num_logits": None})
    if "weights" in options:
        state = _read_state(options["weights"], options.get("prefix", ""))
        _load_state(source.module, state, options["weights"])
    return source


def _call_factory(name: str) -> nn.Module:
    module_name, _, factory = name.rpartition(":")
    if not module_name:
        raise DataError("python:MODULE:FACTORY expected")
    # A command's path lacks the folder it is called in, which is where one's own module lies.
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module_name), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise DataError(f"cannot be made: {_reason(error)}") from error
    if not isinstance(made, nn.Module):
        raise DataError(f"the factory gives {type(made).__name__}, no torch.nn.Module")
    return made


def _optional(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise DataError(f"needs the package {library}: pip install 'nrcg[classifiers]'") from error


def _read_state(path: str, prefix: str) -> dict[str, Tensor]:
    """A state_dict from .safetensors, or from a .pth file read with weights_only; only the keys that begin with a
    prefix, without it."""
    try:
        refuse_pointer(path)
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as weights ({_reason(error)})") from error
    for key in ("state_dict", "model"):  # as training scripts like to wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no state_dict")
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{path}: {key} holds values that are not finite")
    found = {
        key.removeprefix("module.").removeprefix(prefix): value  # DataParallel's prefix
        for key, value in state.items()
        if key.removeprefix("module.").startswith(prefix)
    }
    if not found:
        raise DataError(f"{path}: no key begins with {prefix!r}; its first is {next(iter(state), 'missing')!r}")
    return found


def _num_logits(state: Mapping[str, Tensor]) -> int:
    """K: rows of the last two-dimensional weight."""
    rows = [len(value) for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    if not rows:
        rows = [len(value) for value in state.values() if value.ndim == 4]  # a last convolution, as in SqueezeNet
    if not rows:
        raise DataError("its weights hold no layer that could give logits")
    return rows[-1]


def _load_state(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path}: does not fit the architecture ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None


LOADERS: dict[str, Callable[[str, Mapping[str, str]], Source]] = {
    "torchvision": _load_torchvision,
    "timm": _load_timm,
    "transformers": _load_transformers,
    "python": _load_python,
}
"""Scheme of a SPEC -> what loads its network, from its name and options."""
