"""Keeps what no verb uses out of a verb's process.

Opening one U-Net with diffusers imports each of its transformers and autoencoders, language models, SciPy, torchvision
and torch's compiler: some ten CPU seconds, for every job of the workflow anew. The library itself leaves the imports of
the process that it is used in alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

OPTIONAL = (
    *("transformers", "scipy", "torchvision"),
    *("torch._dynamo", "torch.nn.attention.flex_attention"),
)
"""Modules that diffusers does without where they are missing."""
COLLECTIONS = ("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets")
"""Packages that import each model in them; the models can be imported one by one."""


class _RoIAlign:
    """Loads `torchvision.ops.roi_align`, which every model of torchvision imports, without torch's compiler.

    All it wants of that is a function that an operator calls which classifiers do without.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if name != "torchvision.ops.roi_align" or "torch._dynamo" in sys.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: object) -> None: ...

    def exec_module(self, module: ModuleType) -> None:
        compiler, utilities = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
        utilities.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        stand_ins = {one.__name__: one for one in (compiler, utilities)}
        sys.modules.update(stand_ins)
        try:
            self._loader.exec_module(module)
        finally:
            for name in stand_ins:
                del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


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

    Afterwards everything can be imported as ever, torchvision without torch's compiler. Where diffusers was imported
    before, it stays as it is.
    """
    import torch

    sys.meta_path.insert(0, _RoIAlign())
    if "diffusers" in sys.modules:
        yield
    else:
        absent = [name for name in OPTIONAL if name not in sys.modules]
        sys.modules.update(dict.fromkeys(absent))  # None: as if it were not installed
        try:
            with (
                # The names of all distributions' files, read to find how a package is called that few have.
                mock.patch.object(importlib.metadata, "packages_distributions", dict),
                # Marks functions for a compiler that would be imported for that alone; nrcg calls none of them.
                mock.patch.object(torch.compiler, "disable", _unmarked),
                mock.patch.object(sys, "meta_path", [_Empty(), *sys.meta_path]),
            ):
                yield
        finally:
            for name in absent:
                del sys.modules[name]
    for name in [name for name in sys.modules if name.startswith("diffusers.")]:
        # No bars for two files; whether a model is compiled can be said without the compiler.
        if name == "diffusers.utils.logging":
            sys.modules[name].disable_progress_bar()
        elif hasattr(sys.modules[name], "is_compiled_module"):
            sys.modules[name].is_compiled_module = _is_compiled  # type: ignore[attr-defined]


def import_step(module: str, compute: bool) -> ModuleType:
    """A module of nrcg.steps, for a verb that computes with torch or one that does without it."""
    with lean_imports() if compute else nullcontext():
        return importlib.import_module(f"nrcg.steps.{module}")


def _unmarked(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    return (lambda one: one) if function is None else function


def _is_compiled(module: object) -> bool:
    compiler = sys.modules.get("torch._dynamo")
    return compiler is not None and isinstance(module, compiler.eval_frame.OptimizedModule)
