"""Classifiers by a SPEC string, for the shell and config.yaml.

    FOLDER                        saved by this package (model.safetensors and config.json)
    torchvision:NAME              torchvision's weights for ImageNet
    timm:NAME                     timm's weights (extra `classifiers`)
    transformers:ID_OR_FOLDER     an image classifier of the Hugging Face hub or on disk (extra `classifiers`)
    python:MODULE:FACTORY         what FACTORY() of one's own module gives: an nrcg.Classifier, or a network that takes
                                  images in [-1, 1]

Behind a question mark stand options, joined by &, which overrule what the source declares of itself:
`weights=FILE` (.safetensors, or a state_dict as .pth; its last linear layer says how many classes there are),
`size=64`, `range=0,1`, `mean=0.5,0.5,0.5`, `std=...`, `channels=1`, `classes=cat,dog`. For example
`torchvision:resnet18?weights=mine.pth&size=64&range=0,1&classes=cat,dog`.

No file is loaded that could execute code: state_dicts are read with weights_only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrcg.classifiers import Classifier, probe
from nrcg.diffusion import freeze
from nrcg.errors import DataError

SCHEMES = ("torchvision", "timm", "transformers", "python")
OPTIONS = ("weights", "size", "range", "mean", "std", "channels", "classes")
PROBE_SIZE = 64
"""Height and width of the images that a classifier of any size is tried on."""


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


@dataclass
class Spec:
    """A SPEC string in its parts."""

    scheme: str
    name: str
    options: dict[str, str] = field(default_factory=dict)


def is_spec(text: str) -> bool:
    """Whether a string names a classifier by a scheme and not by a folder of its own."""
    return text.partition(":")[0] in SCHEMES


def parse(text: str) -> Spec:
    """The parts of `SCHEME:NAME[?key=value&...]`. Raises DataError: another scheme, an unknown option."""
    scheme, _, rest = text.partition(":")
    name, _, query = rest.partition("?")
    if scheme not in SCHEMES or not name:
        raise DataError(
            f"classifier {text!r}: no such folder, and no SPEC; allowed: a saved classifier's folder, torchvision:NAME,"
            " timm:NAME, transformers:ID_OR_FOLDER, python:MODULE:FACTORY"
        )
    options = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in OPTIONS or not value:
            raise DataError(
                f"classifier {text!r}: option {part!r} is unknown; allowed: {', '.join(OPTIONS)}, as key=value"
            )
        options[key] = value
    return Spec(scheme, name, options)


def load_classifier(spec: str | Path, class_map: Mapping[str, Any] | None = None) -> Classifier:
    """A classifier by its SPEC or folder, frozen, in eval mode, and tried on an image.

    Args:
        spec: see the module's docstring.
        class_map: our class names to the classifier's classes: a name, a number, or a list of them whose
            probabilities add up. The result has our classes, in the mapping's order.

    Raises:
        DataError: unknown, missing or damaged, or its output is not (B, K) logits with a gradient.
    """
    from nrcg import classifiers

    text = os.fspath(spec)
    if is_spec(text):
        parsed = parse(text)
        try:
            classifier = _adapt(_LOADERS[parsed.scheme](parsed.name, parsed.options), parsed)
        except (DataError, ValueError) as error:
            raise DataError(f"classifier {text!r}: {error}") from error
    elif Path(text).exists() or os.sep in text:
        classifier = classifiers.load_classifier(text)
    else:
        parse(text)  # refused, with what is allowed
        raise AssertionError
    size = classifier.image_size or PROBE_SIZE
    try:
        if class_map is not None:
            classifier.group(*_groups(text, freeze(classifier), class_map))
        num_classes = probe(freeze(classifier), torch.zeros(1, classifier.channels or 3, size, size))
    except (ValueError, TypeError) as error:
        raise DataError(f"classifier {text!r}: {error}") from error
    if classifier.classes is not None and len(classifier.classes) != num_classes:
        raise DataError(
            f"classifier {text!r}: it has {num_classes} classes, but {len(classifier.classes)} names of them are given"
        )
    return classifier


def load_for_classes(spec: str, classes: Sequence[str], class_map: Mapping[str, Any] | None = None) -> Classifier:
    """A classifier whose classes are a data set's, in its order.

    Args:
        spec: see `load_classifier`.
        classes: the data set's.
        class_map: their names to the classifier's classes; None where its classes have the same names, or no names
            and the same number and order.

    Raises:
        DataError: see `load_classifier`; or the classes do not fit.
    """
    if class_map is None:
        classifier = load_classifier(spec)
        if classifier.classes is None:
            size = classifier.image_size or PROBE_SIZE
            count = probe(classifier, torch.zeros(1, classifier.channels or 3, size, size))
            if count != len(classes):
                raise DataError(
                    f"classifier {spec!r}: it has {count} classes, the data set {len(classes)}; give class_map"
                )
            classifier.classes = list(classes)
        if classifier.classes == list(classes):
            return classifier
        if not set(classes) <= set(classifier.classes):
            names = ", ".join(classifier.classes[:10]) + (", ..." if len(classifier.classes) > 10 else "")
            raise DataError(f"classifier {spec!r}: its classes are {names}; give a class_map for {', '.join(classes)}")
        class_map = {name: name for name in classes}
    return load_classifier(spec, {name: class_map[name] for name in classes})


def build(rebuild: Mapping[str, Any]) -> nn.Module:
    """The network of a `Classifier.rebuild` record, without its weights.

    Raises:
        DataError: the library it comes from is not installed or no longer has it.
    """
    scheme, _, name = rebuild["architecture"].partition(":")
    num_logits = rebuild["num_logits"]
    if scheme == "torchvision":
        return _torchvision_module(name, num_logits)
    if scheme == "timm":
        return _optional("timm").create_model(name, pretrained=False, num_classes=num_logits)
    if scheme == "transformers":
        transformers = _optional("transformers")
        settings = dict(rebuild["transformers_config"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return transformers.AutoModelForImageClassification.from_config(config)
    made = _call_factory(name)
    return made.module if isinstance(made, Classifier) else made


def _adapt(source: Source, spec: Spec) -> Classifier:
    """The network in an adapter: what the source declares, with the SPEC's options laid over it."""
    options = spec.options
    image_size = _numbers(options, "size", int, 1)
    input_range = _numbers(options, "range", float, 2)
    mean, std = _numbers(options, "mean", float), _numbers(options, "std", float)
    channels = _numbers(options, "channels", int, 1)
    classifier = Classifier(
        source.module.to(memory_format=torch.channels_last),
        image_size=image_size[0] if image_size else source.image_size,
        input_range=tuple(input_range) if input_range else source.input_range,
        mean=mean or source.mean,
        std=std or source.std,
        channels=channels[0] if channels else source.channels,
        classes=options["classes"].split(",") if "classes" in options else source.classes,
    )
    classifier.rebuild = source.rebuild
    return classifier


def _numbers(options: Mapping[str, str], key: str, kind: Callable, count: int | None = None) -> list | None:
    if key not in options:
        return None
    try:
        numbers = [kind(part) for part in options[key].split(",")]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        raise DataError(f"option {key}={options[key]}: {count or 'some'} number{'s' if count != 1 else ''} expected")
    return numbers


def _groups(text: str, classifier: Classifier, class_map: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Our names, and for each the positions of the classifier's classes that it stands for."""
    where = f"classifier {text!r}: class_map"
    size = classifier.image_size or PROBE_SIZE
    count = probe(classifier, torch.zeros(1, classifier.channels or 3, size, size))
    theirs, seen = classifier.classes, set()
    if len(class_map) < 2:
        raise DataError(f"{where}: at least two classes are needed")
    groups = []
    for ours, wanted in class_map.items():
        group = []
        for entry in wanted if isinstance(wanted, list | tuple) else [wanted]:
            position = theirs.index(entry) if theirs is not None and entry in theirs else entry
            if isinstance(position, str):
                names = (
                    f"it has {', '.join(theirs[:10])}{', ...' if len(theirs) > 10 else ''}" if theirs else "use numbers"
                )
                raise DataError(f"{where}.{ours}: no class {entry!r}; {names}")
            if not 0 <= position < count:
                raise DataError(f"{where}.{ours}: {position} is no class; it has {count}")
            if position in seen:
                raise DataError(f"{where}.{ours}: class {position} stands there twice")
            seen.add(position)
            group.append(position)
        groups.append(group)
    return list(class_map), groups


# --- Where the networks come from -------------------------------------------------------------------------------


def _load_torchvision(name: str, options: Mapping[str, str]) -> Source:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise DataError(f"torchvision has no classifier {name!r}; `torchvision.models.list_models()` lists them")
    weights = models.get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    if "weights" in options:
        state = _read_state(options["weights"])
        module, classes = _torchvision_module(name, _num_logits(state)), None
        _load_state(module, state, options["weights"])
    else:
        try:
            module = models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise DataError(f"download {weights.url} to {file} ({_reason(error)})") from error
        classes = list(weights.meta["categories"])
    return Source(
        module,
        {"architecture": f"torchvision:{name}", "num_logits": _num_logits(module.state_dict())},
        image_size=transforms.crop_size[0],
        input_range=(0.0, 1.0),
        mean=transforms.mean,
        std=transforms.std,
        channels=3,
        classes=classes,
    )


def _torchvision_module(name: str, num_logits: int) -> nn.Module:
    from torchvision import models

    # Some towers of auxiliary losses give more than logits, and only while training.
    settings = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, num_classes=num_logits, **settings)


def _load_timm(name: str, options: Mapping[str, str]) -> Source:
    timm = _optional("timm")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        raise DataError(f"timm has no model {name!r}; `timm.list_models()` lists them")
    if "weights" in options:
        state = _read_state(options["weights"])
        module = timm.create_model(name, pretrained=False, num_classes=_num_logits(state))
        _load_state(module, state, options["weights"])
    else:
        try:
            module = timm.create_model(name, pretrained=True)
        except Exception as error:  # of whichever library fetches it
            raise DataError(f"its weights cannot be fetched ({_reason(error)}); give ?weights=FILE") from error
    data = timm.data.resolve_model_data_config(module)
    return Source(
        module,
        {"architecture": f"timm:{name}", "num_logits": module.num_classes},
        image_size=data["input_size"][1],
        input_range=(0.0, 1.0),
        mean=data["mean"],
        std=data["std"],
        channels=data["input_size"][0],
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
        if set(options) - {"weights", "classes"}:
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
        _load_state(source.module, _read_state(options["weights"]), options["weights"])
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


# --- Weights ----------------------------------------------------------------------------------------------------


def _read_state(path: str) -> dict[str, Tensor]:
    """A state_dict from .safetensors, or from a .pth file read with weights_only."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:
        raise DataError(f"{path}: cannot be read as weights ({_reason(error)})") from error
    for key in ("state_dict", "model"):  # as training scripts like to wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no state_dict")
    return {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel's prefix


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


_LOADERS: dict[str, Callable[[str, Mapping[str, str]], Source]] = {
    "torchvision": _load_torchvision,
    "timm": _load_timm,
    "transformers": _load_transformers,
    "python": _load_python,
}
