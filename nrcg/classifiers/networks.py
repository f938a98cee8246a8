"""Where the networks of a SPEC come from: torchvision, timm, transformers, one's own module.

A loader gives the network with its weights, in an adapter for what it declares of itself; `build` makes the network
again without them. No file is loaded that could execute code: state_dicts are read with weights_only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.clip import TextSimilarity, rebuilt, text_features
from nrcg.classifiers.preprocessing import check_like, of_processor, of_timm, of_torchvision
from nrcg.errors import DataError
from nrcg.files import refuse_pointer


def build(rebuild: Mapping[str, Any]) -> nn.Module:
    """The network of a `Classifier.rebuild` record, without its weights.

    Raises:
        DataError: the library it comes from is not installed or no longer has it.
    """
    scheme, _, name = rebuild["architecture"].partition(":")
    if scheme == "python":
        made = _call_factory(name)
        return made.module if isinstance(made, Classifier) else made
    if scheme == "clip":
        return rebuilt(_optional("transformers"), rebuild["clip_config"], tuple(rebuild["texts"]))
    if scheme == "transformers":
        transformers = _optional("transformers")
        settings = dict(rebuild["transformers_config"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return transformers.AutoModelForImageClassification.from_config(config)
    if scheme == "timm":
        module = _optional("timm").create_model(name, pretrained=False, num_classes=rebuild["num_logits"])
    else:
        from torchvision import models

        # Without it torchvision warns, and fills in weights that are replaced anyway.
        settings = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        module = models.get_model(name, weights=None, num_classes=rebuild["num_logits"], **settings)
    if "first_conv" in rebuild:
        _reshape(_first_conv(module)[1], **rebuild["first_conv"])
    return module


def _load_torchvision(name: str, options: Mapping[str, str]) -> Classifier:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise DataError(f"torchvision has no classifier {name!r}; `torchvision.models.list_models()` lists them")
    weights, classes = models.get_model_weights(name).DEFAULT, None
    if "weights" in options:
        module, rebuild = _with_state(f"torchvision:{name}", options)
    else:
        try:
            module = models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise DataError(f"download {weights.url} to {file} ({_reason(error)})") from error
        classes = list(weights.meta["categories"])
        rebuild = {"architecture": f"torchvision:{name}", "num_logits": len(classes)}
    return _adapted(module, rebuild, of_torchvision(weights.transforms()), classes)


def _load_timm(name: str, options: Mapping[str, str]) -> Classifier:
    timm = _optional("timm")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        raise DataError(f"timm has no model {name!r}; `timm.list_models()` lists them")
    if "weights" in options:
        module, rebuild = _with_state(f"timm:{name}", options)
    else:
        try:
            module = timm.create_model(name, pretrained=True)
        except Exception as error:  # of whichever library fetches it
            raise DataError(f"its weights cannot be fetched ({_reason(error)}); give ?weights=FILE") from error
        rebuild = {"architecture": f"timm:{name}", "num_logits": module.num_classes}
    seen, names = timm.data.resolve_model_data_config(module), module.pretrained_cfg.get("label_names")
    classes = list(names) if names is not None and len(names) == module.num_classes else None
    return _adapted(module, rebuild, of_timm(seen), classes)


def _adapted(module: nn.Module, rebuild: dict, known: dict, classes: list | None) -> Classifier:
    """A network for images in [0, 1]; mean and std are its library's, which mean nothing for other channels."""
    channels = rebuild.get("first_conv", {}).get("in_channels", len(known["mean"]))
    if channels != len(known["mean"]):
        known = known | {"mean": None, "std": None, "channels": channels}
    return Classifier(module, input_range=(0.0, 1.0), **known, classes=classes, rebuild=rebuild)


def _with_state(architecture: str, options: Mapping[str, str]) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the weights of a file, and its `rebuild` record.

    The file says how many logits there are, and whether the first convolution takes other channels or adds a bias.
    """
    state = _read_state(options)
    rebuild: dict[str, Any] = {"architecture": architecture, "num_logits": _num_logits(state)}
    module = build(rebuild)
    name, conv = _first_conv(module)
    weight = state.get(f"{name}.weight")
    if conv is not None and weight is not None and weight.ndim == 4:
        found = {"in_channels": weight.shape[1], "bias": f"{name}.bias" in state}
        if found != {"in_channels": conv.weight.shape[1], "bias": conv.bias is not None}:
            rebuild["first_conv"] = found
            _reshape(conv, **found)
    _load_state(module, state, options["weights"])
    return module, rebuild


def _first_conv(module: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """Name and layer of the first convolution; None for a network without one."""
    convs = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    return next(convs, ("", None))


def _reshape(conv: nn.Conv2d, in_channels: int, bias: bool) -> None:
    """Make room in a convolution for weights of other channels, and for a bias or none."""
    conv.in_channels = in_channels
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_channels, *conv.kernel_size))
    conv.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels)) if bias else None


def _num_logits(state: Mapping[str, Tensor]) -> int:
    """K: rows of the last two-dimensional weight, or of the last convolution, as in SqueezeNet."""
    rows = [len(value) for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    rows = rows or [len(value) for value in state.values() if value.ndim == 4]
    if not rows:
        raise DataError("its weights hold no layer that could give logits")
    return rows[-1]


def _load_transformers(name: str, options: Mapping[str, str]) -> Classifier:
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
    config, channels = module.config, getattr(module.config, "num_channels", None)
    processor = _open_processor(transformers, name)
    names = [str(config.id2label[index]) for index in range(len(config.id2label))]
    if len(names) == 1:
        if config.problem_type == "regression":
            raise DataError("it is a regression of one number, no classifier")
        names = [f"not {names[0]}", names[0]]
    classifier = Classifier(
        module,
        **of_processor(processor, channels if isinstance(channels, int) else None),
        classes=names,
        rebuild={"architecture": f"transformers:{name}", "transformers_config": config.to_dict()},
    )
    check_like(processor, classifier.prepare, classifier.channels or 3)
    return classifier


def _load_clip(name: str, options: Mapping[str, str]) -> Classifier:
    """Zero-shot logits of the option `texts`, of a CLIP-like model."""
    transformers = _optional("transformers")
    texts = [text.strip() for text in options.get("texts", "").split("|") if text.strip()]
    if not texts:
        raise DataError("option texts: missing; give clip:ID_OR_FOLDER?texts=a photo of a cat|a photo of a dog")
    if "weights" in options:
        raise DataError("option weights: a CLIP folder holds its own")
    try:
        model = transformers.AutoModel.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of whichever library fetches or opens it
        raise DataError(f"no CLIP-like model can be opened from it ({_reason(error)})") from error
    if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
        raise DataError(f"it is a {model.config.model_type}, which compares no images with texts")
    processor = _open_processor(transformers, name)
    module = TextSimilarity(model, text_features(model, tokenizer, texts))
    # One text is a score, to be followed by the target `score`; two or more are classes.
    names = texts if len(texts) > 1 else None
    rebuild = {"architecture": f"clip:{name}", "clip_config": model.config.to_dict(), "texts": list(module.texts.shape)}
    classifier = Classifier(module, **of_processor(processor, 3), classes=names, rebuild=rebuild)
    check_like(processor, classifier.prepare, 3)
    return classifier


def _open_processor(transformers: Any, name: str) -> Any:
    """The image processor of a folder or hub id, on tensors."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, backend="torchvision", trust_remote_code=False)
    except Exception as error:  # of whichever library fetches or opens it
        raise DataError(
            f"its preprocessor_config.json cannot be read ({_reason(error)}); it tells the range and size of the images"
        ) from error


def _load_python(name: str, options: Mapping[str, str]) -> Classifier:
    made = _call_factory(name)
    if not isinstance(made, Classifier):
        made = Classifier(made)
    elif set(options) - {"weights", "prefix", "classes"}:
        raise DataError("the factory gives an nrcg.Classifier, which says itself what it expects; drop the options")
    if "weights" in options:
        _load_state(made.module, _read_state(options), options["weights"])
    made.rebuild = {"architecture": f"python:{name}"}
    return made


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


def _read_state(options: Mapping[str, str]) -> dict[str, Tensor]:
    """The state_dict of the option weights: of its keys those that begin with the option prefix, without it."""
    path, prefix = options["weights"], options.get("prefix", "")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    refuse_pointer(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as weights ({_reason(error)})") from error
    for key in ("state_dict", "model"):  # as training scripts like to wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no state_dict")
    named = {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel's prefix
    found = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    if not found:
        raise DataError(f"{path}: no key begins with {prefix!r}; the first is {next(iter(named), 'missing')!r}")
    for key, value in found.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{path}: {prefix}{key} holds values that are not finite")
    return found


def _load_state(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path}: does not fit the architecture ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


LOADERS: dict[str, Callable[[str, Mapping[str, str]], Classifier]] = {
    "torchvision": _load_torchvision,
    "timm": _load_timm,
    "transformers": _load_transformers,
    "clip": _load_clip,
    "python": _load_python,
}
"""Scheme of a SPEC -> what loads its network, from its name and options."""
