"""Classifiers by a SPEC string, for the shell and config.yaml.

    FOLDER                        saved by this package (model.safetensors and config.json)
    torchvision:NAME              torchvision's weights for ImageNet
    timm:NAME                     timm's weights (extra `classifiers`)
    transformers:ID_OR_FOLDER     an image classifier of the Hugging Face hub or on disk (extra `classifiers`)
    python:MODULE:FACTORY         what FACTORY() of one's own module gives: an nrcg.Classifier, or a network that takes
                                  images in [-1, 1]

Behind a question mark stand options, joined by &, which overrule what the source declares of itself:
`weights=FILE` (.safetensors, or a state_dict as .pth; its last linear layer says how many classes there are),
`prefix=classifier.` (of the keys of that file that are taken),
`size=64`, `range=0,1`, `mean=0.5,0.5,0.5`, `std=...`, `channels=1`, `classes=cat,dog`. For example
`torchvision:resnet18?weights=mine.pth&size=64&range=0,1&classes=cat,dog`.

No file is loaded that could execute code: state_dicts are read with weights_only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nrcg.classifiers.adapter import Classifier, probe
from nrcg.classifiers.networks import LOADERS, Source
from nrcg.classifiers.storage import open_classifier
from nrcg.devices import freeze
from nrcg.errors import DataError

OPTIONS = ("weights", "prefix", "size", "range", "mean", "std", "channels", "classes")
PROBE_SIZE = 64
"""Height and width of the images that a classifier of any size is tried on."""


@dataclass
class Spec:
    """A SPEC string in its parts."""

    scheme: str
    name: str
    options: dict[str, str] = field(default_factory=dict)


def is_spec(text: str) -> bool:
    """Whether a string names a classifier by a scheme and not by a folder of its own."""
    return text.partition(":")[0] in LOADERS


def parse(text: str) -> Spec:
    """The parts of `SCHEME:NAME[?key=value&...]`. Raises DataError: another scheme, an unknown option."""
    scheme, _, rest = text.partition(":")
    name, _, query = rest.partition("?")
    if scheme not in LOADERS or not name:
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
    text = os.fspath(spec)
    if is_spec(text):
        parsed = parse(text)
        try:
            classifier = _adapt(LOADERS[parsed.scheme](parsed.name, parsed.options), parsed)
        except (DataError, ValueError) as error:
            raise DataError(f"classifier {text!r}: {error}") from error
    elif Path(text).exists() or os.sep in text:
        classifier = open_classifier(text)
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
