"""docs/config.md, made from the models of config.yaml: every key, what it may be, its default and its meaning."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nrcg.config.basics import StepCount
from nrcg.config.experiment import ExperimentConfig
from nrcg.config.messages import models_in
from nrcg.config.methods import MethodConfig
from nrcg.config.studies import DensitiesConfig

HEADER = """\
# Every key of config.yaml

*Made by `nrcg schema --docs` from the models that check the file; `config.schema.json` says the same to editors.*

`config.yaml` holds `defaults`, `methods`, `experiments` and, if you like, `densities`. An experiment is `defaults` with
its own keys laid over it: mappings merge key by key, lists are replaced. An unknown key or a wrong type is refused in
one line before any job starts (`nrcg validate`). The third column is what the shipped `defaults` say, or what holds
where a key is left out.
"""
NUMBERS = {int: "whole number", float: "number"}
WORDS = {str: "text", bool: "true, false", type(None): "null"} | NUMBERS


def config_reference(raw: dict) -> str:
    """Text of docs/config.md. `raw` is config.yaml as read from YAML: its `defaults` are shown."""
    lines = [HEADER, "## Keys of an experiment"]
    shown: set[type[BaseModel]] = set()
    lines += _sections(ExperimentConfig, "", raw["defaults"], shown)
    lines += ["\n## Keys of a method", *_sections(MethodConfig, "", {}, shown)]
    lines += ["\n## Keys of densities", *_sections(DensitiesConfig, "", raw.get("densities"), shown)]
    return "\n".join(lines) + "\n"


def _sections(model: type[BaseModel], place: str, values: Any, shown: set[type[BaseModel]]) -> Iterator[str]:
    """Lines about a model and those below it; a model that stands at several places is shown at the first."""
    shown.add(model)
    values = values if isinstance(values, dict) else {}
    if place:
        source = model.model_fields.get("source")
        yield f"\n### {place}" + (f": {get_args(source.annotation)[0]}" if source else "")
    yield f"\n{' '.join(model.__doc__.split())}\n"
    yield from ("| key | may be | default | meaning |", "|---|---|---|---|")
    below = []
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        below += [(entry, f"{place}.{name}".lstrip("."), values.get(name)) for entry in inner]
        allowed = _allowed(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        default = (
            "" if inner else _default(values.get(name, PydanticUndefined if field.is_required() else field.default))
        )
        meaning = field.description or " ".join(inner[0].__doc__.split())
        cells = (f"`{name}`", allowed, default, meaning)
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace('[', '&#91;') for cell in cells)} |"
    for entry, entry_place, entry_values in below:
        if entry not in shown:
            yield from _sections(entry, entry_place, entry_values, shown)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if 0 < len(text) <= 30 else "see the file" if text else "empty"


def _allowed(annotation: Any) -> str:
    """What a value may be, in words."""
    if models_in(annotation):
        return "list of mappings, below" if get_origin(annotation) is list else "mapping, below"
    if annotation == StepCount:
        return "whole number ≥ 1 or share below 1"
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return " ".join([_allowed(arguments[0]), *_limits(arguments[1:])])
    if origin in (Union, types.UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is list:
        return f"list of: {_allowed(arguments[0])}"
    return "mapping"


def _limits(metadata: tuple) -> Iterator[str]:
    for entry in metadata:
        for limit in getattr(entry, "metadata", None) or [entry]:  # pydantic's Field holds annotated_types
            for kind, key, sign in ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤")):
                if isinstance(limit, kind):
                    yield f"{sign} {getattr(limit, key):g}"
            if isinstance(limit, MinLen):
                yield f"(at least {limit.min_length})"
