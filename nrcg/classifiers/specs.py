"""Classifiers by a SPEC string, for the shell and config.yaml.

    FOLDER                        saved by this package (model.safetensors and config.json)
    torchvision:NAME              torchvision's weights for ImageNet
    timm:NAME                     timm's weights (extra `classifiers`)
    transformers:ID_OR_FOLDER     an image classifier of the Hugging Face hub or on disk (extra `classifiers`)
    clip:ID_OR_FOLDER?texts=A|B   a CLIP-like model's similarity to texts, as logits of classes of these names; one text
                                  alone is a score (extra `classifiers`)
    python:MODULE:FACTORY         what FACTORY() of one's own module gives: an nrcg.Classifier, or a network that takes
                                  images in [-1, 1]

Behind a question mark stand options, joined by &, which overrule what the source declares of itself:

    weights=FILE                  .safetensors, or a state_dict as .pth, in the place of the source's own; it says how
                                  many classes there are, and the channels and the bias of the first convolution
    prefix=classifier.            keys of FILE that are taken, and what is cut off of them
    size=64  range=0,1  mean=0.5,0.5,0.5  std=0.2,0.2,0.2  channels=1
                                  images as the network expects them (`nrcg.Classifier`); with size, the whole image
                                  is resized, where the source's own preparation cuts off its borders
    classes=cat,dog               names of the classes, in the network's order

For example `torchvision:resnet18?weights=mine.pth&size=64&range=0,1&classes=cat,dog`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.logits import listed
from nrcg.classifiers.networks import LOADERS, build
from nrcg.classifiers.storage import open_classifier
from nrcg.devices import freeze
from nrcg.errors import DataError

SETTINGS: dict[str, tuple[str, Callable[[str], float], int | None]] = {
    "size": ("image_size", int, 1),
    "range": ("input_range", float, 2),
    "mean": ("mean", float, None),
    "std": ("std", float, None),
    "channels": ("channels", int, 1),
}
"""Option -> the setting of the adapter, the kind of its numbers, and how many they are (None: one or more)."""
OPTIONS = ("weights", "prefix", *SETTINGS, "classes", "texts")


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Scheme, name, options of `SCHEME:NAME[?key=value&...]`. Raises DataError: another scheme, an unknown option."""
    scheme, _, rest = text.partition(":")
    name, _, query = rest.partition("?")
    if scheme not in LOADERS or not name:
        raise DataError(
            "no such folder, and no SPEC; allowed: a saved classifier's folder, torchvision:NAME, timm:NAME,"
            " transformers:ID_OR_FOLDER, clip:ID_OR_FOLDER?texts=A|B, python:MODULE:FACTORY"
        )
    options = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in OPTIONS or not value:
            raise DataError(f"option {part!r} is unknown; allowed: {', '.join(OPTIONS)}, as key=value")
        options[key] = value
    if "texts" in options and scheme != "clip":
        raise DataError("option texts: is for clip:")
    if "prefix" in options and "weights" not in options:
        raise DataError("option prefix: is for the keys of weights=FILE, which is missing")
    return scheme, name, options


def load_classifier(spec: str | Path, class_map: Mapping[str, Any] | None = None, *, logits: bool = True) -> Classifier:
    """A classifier by its SPEC or folder, frozen, in eval mode, and tried on an image.

    Args:
        spec: Folder, or SPEC as the module's docstring has it.
        class_map: Our class names to the classifier's classes: a name, a number, or a list of them whose
            probabilities add up. The result has our classes, in the mapping's order.
        logits: Whether its outputs are logits of classes; else numbers of a regression or a score.

    Raises:
        DataError: unknown, missing or damaged, or its output is not (B, K) logits with a gradient.
    """
    text = os.fspath(spec)
    folder = text.partition(":")[0] not in LOADERS and (Path(text).exists() or os.sep in text)
    classifier = open_classifier(text) if folder else None
    try:
        if classifier is None:
            scheme, name, options = parse(text)
            classifier = freeze(_with_options(LOADERS[scheme](name, options), options))
            if logits and scheme == "clip" and classifier.classes is None:
                raise DataError("one text alone is a score: give the target `score`, or two texts or more")
        if class_map is not None:
            classifier.group(list(class_map), _groups(classifier, class_map))
        count = classifier.count_classes(logits)
        if logits and classifier.classes is not None and len(classifier.classes) != count:
            raise DataError(f"it has {count} classes, but {len(classifier.classes)} names of them are given")
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"classifier {text!r}: {error}") from error
    return classifier


def with_new_head(spec: str, num_classes: int) -> Classifier:
    """A network of torchvision or timm with its weights and, for other classes, a last layer of random ones.

    Args:
        spec: torchvision:NAME or timm:NAME, with options.
        num_classes: K, the number of logits.

    Returns:
        It, with what it expects of its images, ready to be trained.

    Raises:
        DataError: See `load_classifier`; or it is no network of these.
    """
    classifier = load_classifier(spec)
    rebuild, state = classifier.rebuild, classifier.module.state_dict()
    if rebuild is None or "num_logits" not in rebuild:
        raise DataError(f"classifier {spec!r}: only networks of torchvision: and timm: can be given a new last layer")
    # What has another shape for another number of classes, also where theirs is the same number.
    other = build(rebuild | {"num_logits": rebuild["num_logits"] + 1}).state_dict()
    rebuild = rebuild | {"num_logits": num_classes}
    module = build(rebuild)
    kept = {name: value for name, value in state.items() if value.shape == other[name].shape}
    module.load_state_dict(module.state_dict() | kept)
    return Classifier(module, **classifier.settings(), rebuild=rebuild)


def load_for_classes(spec: str, classes: Sequence[str], class_map: Mapping[str, Any] | None = None) -> Classifier:
    """A classifier whose classes are a data set's, in its order.

    Args:
        spec: Folder or SPEC.
        classes: Names of the data set's classes.
        class_map: Those names to the classifier's classes; None where its classes have the same names, or no names
            and the same number and order.

    Raises:
        DataError: see `load_classifier`; or the classes do not fit.
    """
    if class_map is not None:
        return load_classifier(spec, {name: class_map[name] for name in classes})
    classifier = load_classifier(spec)
    if classifier.classes is None:
        count = classifier.count_classes()
        if count != len(classes):
            raise DataError(f"classifier {spec!r}: it has {count} classes, the data set {len(classes)}; give class_map")
        classifier.classes = list(classes)
    theirs = classifier.classes
    if not set(classes) <= set(theirs):
        wanted = f"give a class_map for {', '.join(classes)}"
        raise DataError(f"classifier {spec!r}: its classes are {listed(theirs)}; {wanted}")
    if theirs != list(classes):
        classifier.group(classes, [[theirs.index(name)] for name in classes])
    return classifier


def _with_options(classifier: Classifier, options: Mapping[str, str]) -> Classifier:
    """What the source declares, with the SPEC's options laid over it."""
    settings = classifier.settings()
    for option, (setting, kind, count) in SETTINGS.items():
        if option in options:
            try:
                numbers = [kind(part) for part in options[option].split(",")]
            except ValueError:
                numbers = []
            if not numbers or len(numbers) != (count or len(numbers)):
                expected = f"{count or 'some'} number{'' if count == 1 else 's'}"
                raise DataError(f"option {option}={options[option]}: {expected} expected")
            settings[setting] = numbers[0] if count == 1 else numbers
            if option == "size":
                settings["resizing"] = None  # the whole image then
    classes = options["classes"].split(",") if "classes" in options else classifier.classes
    module = classifier.module.to(memory_format=torch.channels_last)
    adapted = Classifier(module, **settings, classes=classes, rebuild=classifier.rebuild)
    adapted.groups = classifier.groups
    return adapted


def _groups(classifier: Classifier, class_map: Mapping[str, Any]) -> list[list[int]]:
    """For each of our names, the positions of the classifier's classes that it stands for."""
    if len(class_map) < 2:
        raise DataError("class_map: at least two classes are needed")
    count, theirs, seen = classifier.count_classes(), classifier.classes or [], set()
    groups = []
    for ours, wanted in class_map.items():
        entries = wanted if isinstance(wanted, list | tuple) else [wanted]
        groups.append([theirs.index(entry) if entry in theirs else entry for entry in entries])
        for position in groups[-1]:
            if isinstance(position, str):
                names = f"it has {listed(theirs)}" if theirs else "use numbers"
                raise DataError(f"class_map.{ours}: no class {position!r}; {names}")
            if not 0 <= position < count:
                raise DataError(f"class_map.{ours}: {position} is no class; it has {count}")
            if position in seen:
                raise DataError(f"class_map.{ours}: class {position} stands there twice")
            seen.add(position)
    return groups
