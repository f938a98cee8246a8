"""What pydantic refuses, as one line that names the key."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in one line: key, what is wrong, what is allowed. `root` is the model that refused."""
    errors = error.errors()
    first = errors[0]
    parts, models = _locate(first["loc"], root)
    key = ".".join(parts)
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        _, above = _locate(first["loc"][:-1], root)
        text = f"unknown key; allowed here: {', '.join(sorted(above[0].model_fields))}"
        if len(_union_at(first["loc"], root)) > 1:
            text += f" (source {_tag(above[0])})"
    elif kind == "missing":
        text = "missing; give it here or in defaults"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        text = f"should be a mapping, got {value!r}"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        key = f"{key}.source"
        given = "missing" if kind == "union_tag_not_found" else f"{first['ctx']['tag']!r} is no source of images"
        text = f"{given}; allowed: {', '.join(map(_tag, models))}"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
        # A validator names the keys below the model it belongs to.
        match = re.match(r"^((?:\w+\.)*\w+): (.*)$", text, re.DOTALL)
        if match:
            key = f"{key}.{match[1]}" if key and not match[1].startswith("experiments.") else match[1]
            text = match[2]
    else:
        text = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {value!r}"
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+", value):
            text += " (YAML reads this as text: write it with a point and a sign, such as 1.0e-3 or 1.0e+3)"
        elif kind == "string_type":
            text += " (put it in quotes)"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {text}{more}"


def _locate(loc: tuple, root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys that lead to a place of the configuration, and the models that may stand there.

    Where a mapping has several models, pydantic's location holds which of them was taken: that is no key.
    """
    keys: list[str] = []
    models = [root]
    in_container = False
    for part in loc:
        if part == "[key]":
            continue
        if len(models) > 1 and not in_container:
            models = [model for model in models if _tag(model) == part]
            continue
        keys.append(str(part))
        if in_container:  # a key of a mapping or a position in a list
            in_container = False
            continue
        annotation = models[0].model_fields[part].annotation if models and part in models[0].model_fields else None
        models = models_in(annotation)
        in_container = get_origin(annotation) in (dict, list)
    return keys, models


def _union_at(loc: tuple, root: type[BaseModel]) -> list[type[BaseModel]]:
    """The models of the union whose chosen model holds the key at `loc`; fewer than two where there is none."""
    return _locate(loc[:-2], root)[1] if len(loc) > 2 else []


def _tag(model: type[BaseModel]) -> str:
    """The value of `source` that chooses a model of `DatasetConfig`."""
    return get_args(model.model_fields["source"].annotation)[0]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation such as dict[str, Model] or Model | OtherModel is about."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]
