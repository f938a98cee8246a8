"""Keeps what no verb uses out of a verb's process.

Opening one U-Net with diffusers imports each of its transformers and autoencoders, language models, SciPy, torchvision
and torch's compiler: some ten CPU seconds, for every job of the workflow anew. The library itself leaves the imports of
the process that it is used in alone.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

OPTIONAL = (
    *("transformers", "scipy", "torchvision", "jinja2"),
    *("torch._dynamo", "torch.nn.attention.flex_attention"),
)
"""Modules that diffusers does without where they are missing."""
COLLECTIONS = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages that import each model in them; the models can be imported one by one."""


class _Empty:
    """Finds and loads COLLECTIONS without running their own code."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if name not in COLLECTIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: object) -> None: ...

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def lean_imports() -> Iterator[None]:
    """While it lasts, diffusers is imported without OPTIONAL and COLLECTIONS, for a verb that prints its own progress.

    Afterwards everything can be imported as ever. Where diffusers was imported before, it stays as it is.
    """
    import torch

    if "diffusers" in sys.modules:
        yield
        _quiet_diffusers()
        return
    absent = [name for name in OPTIONAL if name not in sys.modules]
    finder, disable = _Empty(), torch.compiler.disable
    sys.modules.update(dict.fromkeys(absent))  # None: as if it were not installed
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    # It marks functions for a compiler that would be imported for that alone; nrcg calls none of them.
    torch.compiler.disable = _unmarked
    try:
        yield
    finally:
        torch.compiler.disable = disable
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in absent:
            del sys.modules[name]
        _quiet_diffusers()


def _quiet_diffusers() -> None:
    """No bars for two files."""
    if "diffusers" in sys.modules:
        from diffusers.utils import logging

        logging.disable_progress_bar()


def _unmarked(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    return (lambda one: one) if function is None else function
