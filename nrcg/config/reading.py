"""Reading `config.yaml`: merged and validated, each mistake as one line."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nrcg.config.experiment import RULES, Config, dataset_owner
from nrcg.config.messages import explain
from nrcg.errors import ConfigError


def merge(base: Any, over: Any) -> Any:
    """Lay `over` on `base`: mappings merge key by key, anything else (lists too) is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = merge(base[key], value) if key in base else copy.deepcopy(value)
        return merged
    return copy.deepcopy(over)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a lost setting should be heard of."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is no plain text", problem_mark=key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is no YAML, holds a key twice or holds no mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; give its path by --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{path}{place}: no valid YAML: {reason}") from None
    except ValueError as error:  # a date such as 2024-13-45
        raise ConfigError(f"{path}: no valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no mapping; expected the keys defaults, methods, experiments")
    return data


def parse(raw: dict, source: str = "config.yaml") -> Config:
    """Merge and validate a configuration as read from YAML.

    Args:
        raw: mapping with the keys defaults, methods and experiments.
        source: the file's name for messages.

    Raises:
        ConfigError: one line that names the key and what is allowed.
    """
    try:
        raw = json.loads(json.dumps(raw, default=str))  # plain dicts, whatever mapping type the reader made
    except ValueError as error:  # an anchor that holds itself
        raise ConfigError(f"{source}: {error}") from None
    for key in raw:
        if key not in ("defaults", "methods", "experiments", "densities"):
            raise ConfigError(f"{source}: {key}: unknown key; allowed here: defaults, densities, experiments, methods")
    for key in ("defaults", "methods", "experiments"):
        if not isinstance(raw.get(key), dict) or not raw[key]:
            raise ConfigError(f"{source}: {key}: missing, empty or no mapping")
    merged = {}
    for name, block in raw["experiments"].items():
        if name in RULES:
            raise ConfigError(f"{source}: experiments.{name}: the name of a rule of the workflow; choose another")
        if not isinstance(block, dict):
            raise ConfigError(f"{source}: experiments.{name}: should be a mapping, got {block!r}")
        merged[name] = merge(raw["defaults"], block)
    try:
        config = Config(methods=raw["methods"], experiments=merged, densities=raw.get("densities"))
    except ValidationError as error:
        message = explain(error, Config)
        # A mistake in `defaults` would be reported for the first experiment that inherits it.
        match = re.match(r"experiments\.(\w+)\.([\w.]+): ", message)
        if match and holds(raw["defaults"], match[2]) and not holds(raw["experiments"][match[1]], match[2]):
            message = f"defaults.{message.split('.', 2)[2]}"
        raise ConfigError(f"{source}: {message}") from None
    for name, experiment in config.experiments.items():
        owner = dataset_owner(config, experiment.dataset.name)
        if config.experiments[owner].dataset != experiment.dataset:
            raise ConfigError(
                f"{source}: experiments.{name}.dataset.name: {experiment.dataset.name!r} is also the data set of"
                f" {owner}, with other settings; give it another name"
            )
    return config


def holds(mapping: Any, dotted: str) -> bool:
    """Whether nested mappings and lists have an entry at a dotted path."""
    for part in dotted.split("."):
        if isinstance(mapping, list) and part.isdecimal() and int(part) < len(mapping):
            mapping = mapping[int(part)]
        elif isinstance(mapping, dict) and part in mapping:
            mapping = mapping[part]
        else:
            return False
    return True


def load(path: str | os.PathLike = "config.yaml") -> Config:
    """Read, merge and validate a configuration file. Raises ConfigError."""
    return parse(read_yaml(path), str(path))
