"""Evaluation of images: `from nrcg.evaluation import evaluate_images, load_extractor, make_reference`.

The names are imported on first use: the modules are heavy, and the workflow needs but one light function of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrcg.evaluation.evaluate import evaluate_features, evaluate_images
    from nrcg.evaluation.features import load_extractor
    from nrcg.evaluation.references import make_reference

_HOMES = {
    "evaluate_features": "evaluate",
    "evaluate_images": "evaluate",
    "load_extractor": "features",
    "make_reference": "references",
}

__all__ = ["evaluate_features", "evaluate_images", "load_extractor", "make_reference"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nrcg.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"nrcg.evaluation.{_HOMES[name]}"), name)
