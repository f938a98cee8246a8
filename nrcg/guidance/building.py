"""The one way from settings, of `config.yaml` or of the shell, to a guidance."""

from __future__ import annotations

from torch import nn

from nrcg.config import PUBLISHED_STEPS, MethodConfig
from nrcg.guidance import scales, stabilizers
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.targets import AnyTarget


def build_guidance(
    method: MethodConfig,
    classifier: nn.Module,
    target: AnyTarget,
    scale: float,
    *,
    num_steps: int = PUBLISHED_STEPS,
    clip_pred_x0: bool = True,
) -> ClassifierGuidance:
    """Guidance as a method asks for it, at one guidance scale.

    Args:
        method: What the classifier sees, and how its gradient is taken, smoothed and scaled.
        classifier: Network that guides.
        target: Class to generate, 0..K-1, or another target.
        scale: Guidance scale s of eq. 1, which the method's schedule multiplies.
        num_steps: Steps of a trajectory. The method's betas hold at 400 steps; with the default they hold per step.
        clip_pred_x0: Whether the image that the classifier sees is clipped to [-1, 1].

    Raises:
        ValueError: A setting is out of its range.
    """
    return ClassifierGuidance(
        classifier,
        target,
        scale=scales.from_config(method.scale_schedule, scale),
        input=method.input,
        stabilizer=stabilizers.from_config(method.stabilizer, num_steps),
        clip_pred_x0=clip_pred_x0,
        grad_mode=method.grad_mode,
        every_k=method.every_k,
        skip_above=method.skip_above,
    )
