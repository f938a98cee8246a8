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
    from nrcg.guidance.latent import GuidedLDMPipeline
    from nrcg.guidance.opening import load_pipeline
    from nrcg.guidance.pipeline import GuidedDDPMPipeline
    from nrcg.guidance.prompted import GuidedStableDiffusionPipeline
    from nrcg.guidance.scales import SNR, Cosine, Interval, Linear
    from nrcg.guidance.stabilizers import EMA, Adam, AdaptiveClip, Chain, Identity, NormClip, Stabilizer, UnitNorm

_HOMES = {
    "Adam": "guidance.stabilizers",
    "AdaptiveClip": "guidance.stabilizers",
    "Chain": "guidance.stabilizers",
    "Classifier": "classifiers.adapter",
    "ClassifierGuidance": "guidance.guidance",
    "Cosine": "guidance.scales",
    "EMA": "guidance.stabilizers",
    "GuidedDDPMPipeline": "guidance.pipeline",
    "GuidedLDMPipeline": "guidance.latent",
    "GuidedStableDiffusionPipeline": "guidance.prompted",
    "Identity": "guidance.stabilizers",
    "Interval": "guidance.scales",
    "Linear": "guidance.scales",
    "NormClip": "guidance.stabilizers",
    "SNR": "guidance.scales",
    "Stabilizer": "guidance.stabilizers",
    "UnitNorm": "guidance.stabilizers",
    "load_classifier": "classifiers.specs",
    "load_pipeline": "guidance.opening",
}

__all__ = [
    "EMA",
    "SNR",
    "Adam",
    "AdaptiveClip",
    "Chain",
    "Classifier",
    "ClassifierGuidance",
    "Cosine",
    "GuidedDDPMPipeline",
    "GuidedLDMPipeline",
    "GuidedStableDiffusionPipeline",
    "Identity",
    "Interval",
    "Linear",
    "NormClip",
    "Stabilizer",
    "UnitNorm",
    "__version__",
    "load_classifier",
    "load_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nrcg' has no attribute {name!r}")
    return getattr(import_module(f"nrcg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
