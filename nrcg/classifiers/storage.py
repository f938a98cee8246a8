"""Classifiers on disk: a folder with the weights and a record of what makes the rest again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.networks import build
from nrcg.devices import freeze
from nrcg.errors import DataError
from nrcg.files import naming, read_record, sha256_file, temporary_name, write_record

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_classifier(folder: str | Path, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, then `config.json`.

    Args:
        folder: Where to write; made if need be.
        module: Network; of a `Classifier` its `.module`.
        config: Record with architecture, classes, image_size, and what else one wants to keep (for an adapter,
            `Classifier.record()`); the weights' SHA-256 is added.
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
        raise DataError("not found", path) from None
    except (ValueError, AttributeError) as error:
        raise DataError(f"damaged ({error})", path) from None


def open_classifier(folder: str | Path) -> Classifier:
    """A classifier saved by `save_classifier`, in eval mode, its parameters frozen.

    Images of another size than it was trained on are resized to that.

    Raises:
        DataError: a file is missing, cut off or does not belong to the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    config = read_classifier_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    module = _build(config)
    try:
        load_model(module, path)
        digest = sha256_file(path)
    except FileNotFoundError:
        raise DataError("not found", path) from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"damaged ({reason})", path) from None
    if config.get("sha256", digest) != digest:
        raise DataError(f"damaged (not the weights of {CONFIG_FILE})", path)
    adapter = config.get("adapter") or {"image_size": config["image_size"], "channels": config.get("channels", 3)}
    module = module.to(memory_format=torch.channels_last)
    classifier = Classifier(module, **adapter, classes=config["classes"], rebuild=config.get("rebuild"))
    if config.get("groups"):
        classifier.group(config["classes"], config["groups"])
    return freeze(classifier)


def _build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a saved classifier, with random weights."""
    if config.get("rebuild"):
        return build(config["rebuild"])
    return build_module(config["architecture"], len(config["classes"]), config.get("batch_norm_momentum", 0.1))
