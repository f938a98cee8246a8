"""Explanations of any classifier by examples: counterfactual, affirmative, semifactual, adversarial; measured.

An explanation is a sample of p(x | x*, y) proportional to p(x) p(y | x)^s exp(-lambda d(x, x*)) (arXiv 2410.20890;
DVCE, NeurIPS 2022; arXiv 2308.06100): near the image x*, realistic, and of the class y. p(x) is a diffusion model that
never saw a label, the classifier any that gives logits. Images in, explanations with probabilities before and after
out:

    import numpy as np
    from nrcg import GuidedDDPMPipeline, explain, load_classifier

    pipe = GuidedDDPMPipeline.from_pretrained("models/quickstart/ddpm")
    guide = load_classifier("models/quickstart/classifiers/non_robust")
    images = np.load("data/sportballs20/val/images.npy")[:8]  # (N, H, W, C) uint8
    found = explain.explain_images(pipe, guide, images, target="baseball")
    found.images  # (N, H, W, C) uint8, the counterfactuals
    found.before[:, 0], found.after[:, 0]  # p(baseball) of the guide
    found.succeeded  # (N,) which of them the guide now calls a baseball

The names are imported on first use: the modules are heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrcg.config.explaining import DISTANCES, KINDS, ExplainSettings, settings_of
    from nrcg.explain.adversarial import attack
    from nrcg.explain.baselines import judged, nearest_images
    from nrcg.explain.cone import cone_projection
    from nrcg.explain.distances import load_distance
    from nrcg.explain.engine import aims_of, explain_images
    from nrcg.explain.explanations import Explanations
    from nrcg.explain.guidance import ExplanationGuidance
    from nrcg.explain.metrics import evaluate_explanations
    from nrcg.explain.repeats import Repeat, repeats_of
    from nrcg.explain.transition import transition_scores

SETTINGS = "nrcg.config.explaining"
_HOMES = {
    "DISTANCES": SETTINGS,
    "KINDS": SETTINGS,
    "ExplainSettings": SETTINGS,
    "ExplanationGuidance": "guidance",
    "Explanations": "explanations",
    "Repeat": "repeats",
    "aims_of": "engine",
    "attack": "adversarial",
    "cone_projection": "cone",
    "evaluate_explanations": "metrics",
    "explain_images": "engine",
    "judged": "baselines",
    "load_distance": "distances",
    "nearest_images": "baselines",
    "repeats_of": "repeats",
    "settings_of": SETTINGS,
    "transition_scores": "transition",
}

__all__ = [
    "DISTANCES",
    "KINDS",
    "ExplainSettings",
    "ExplanationGuidance",
    "Explanations",
    "Repeat",
    "aims_of",
    "attack",
    "cone_projection",
    "evaluate_explanations",
    "explain_images",
    "judged",
    "load_distance",
    "nearest_images",
    "repeats_of",
    "settings_of",
    "transition_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nrcg.explain' has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(import_module(home if "." in home else f"nrcg.explain.{home}"), name)
