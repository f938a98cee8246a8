"""nrcg: classifier guidance of unconditional diffusion models by classifiers that were never trained on noise.

The names below are the public API; they are imported on first use, so that `import nrcg` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nrcg.classifiers.adapter import Classifier
    from nrcg.classifiers.specs import load_classifier
    from nrcg.guidance.guidance import ClassifierGuidance
    from nrcg.guidance.pipeline import GuidedDDPMPipeline
    from nrcg.guidance.stabilizers import EMA, Adam, AdaptiveClip, Chain, Identity, NormClip, Stabilizer, UnitNorm

_HOME = {
    "Adam": "stabilizers",
    "Classifier": "classifiers",
    "ClassifierGuidance": "guidance",
    "AdaptiveClip": "stabilizers",
    "Chain": "stabilizers",
    "EMA": "stabilizers",
    "NormClip": "stabilizers",
    "UnitNorm": "stabilizers",
    "GuidedDDPMPipeline": "sampling",
    "Identity": "stabilizers",
    "Stabilizer": "stabilizers",
    "load_classifier": "specs",
}

__all__ = [
    "EMA",
    "Adam",
    "AdaptiveClip",
    "Chain",
    "Classifier",
    "ClassifierGuidance",
    "GuidedDDPMPipeline",
    "Identity",
    "NormClip",
    "Stabilizer",
    "UnitNorm",
    "__version__",
    "load_classifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nrcg' has no attribute {name!r}")
    return getattr(import_module(f"nrcg.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
