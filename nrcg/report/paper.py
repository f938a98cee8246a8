"""What the paper reports (arXiv 2507.00687): numbers and claims, as data to stand beside our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARXIV = "2507.00687"
TITLE = "Diffusion Classifier Guidance for Non-robust Classifiers"


@dataclass(frozen=True)
class PublishedRow:
    """One row of tables 1 to 3.

    Accuracy in percent, by the classifier that guides (self-graded); FID and cFID by torcheval (its Inception).
    """

    dataset: str
    method: str
    setup: str
    scale: float
    accuracy: float
    fid: float
    cfid: float
    source: str


@dataclass(frozen=True)
class Protocol:
    """How a data set's published numbers were measured."""

    dataset: str
    image_size: int
    num_steps: int
    num_samples: int
    num_reference: int  # draws of training images, with replacement
    start: str = "standard_normal"
    features: str = "torcheval"


_UNCONDITIONAL, _GUIDED = "unconditional", "non-robust + x0 + EMA 0.99"
ROWS = (
    PublishedRow("CelebA", "unconditional", _UNCONDITIONAL, 0, 55.67, 17.68, 30.96, "table 1"),
    PublishedRow("CelebA", "non_robust_x0_ema99", _GUIDED, 150, 99.99, 29.37, 13.90, "table 1"),
    PublishedRow("SportBalls", "unconditional", _UNCONDITIONAL, 0, 29.63, 54.37, 155.19, "table 2"),
    PublishedRow("SportBalls", "non_robust_x0_ema99", _GUIDED, 15, 91.05, 69.64, 18.52, "table 2"),
    PublishedRow("CelebA-HQ", "unconditional", _UNCONDITIONAL, 0, 77.1, 45.57, 49.70, "table 3"),
    PublishedRow("CelebA-HQ", "non_robust_x0_ema99", _GUIDED, 10, 99.02, 50.67, 42.18, "table 3"),
)
PROTOCOLS = {
    "CelebA": Protocol("CelebA", image_size=64, num_steps=400, num_samples=50176, num_reference=50176),
    "SportBalls": Protocol("SportBalls", image_size=64, num_steps=400, num_samples=50176, num_reference=50176),
    "CelebA-HQ": Protocol("CelebA-HQ", image_size=256, num_steps=1000, num_samples=1024, num_reference=1024),
}
COMPARED_WITH = {
    "quickstart": "SportBalls",
    "sportballs": "SportBalls",
    "celeba": "CelebA",
    "celebahq": "CelebA-HQ",
}
"""Experiment name -> the published data set that it is compared with; own experiments have none."""


SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("ddpm.ema_decay", 0.0, "diffusion model's weights averaged (decay {0}) instead of the last ones"),
    ("classifiers.non_robust.optimizer.warmup_steps", 500, "classifiers with {0} steps of warm-up instead of {1}"),
    ("classifiers.non_robust.optimizer.grad_clip", None, "classifiers' gradients clipped at norm {0} instead of never"),
    ("forward.noise", "per_step", "forward analysis with one noise for an image instead of a new one at every step"),
    ("dataset.diameter", [0.14, 0.39], "balls of {0} of the canvas' width instead of {1}"),
)
"""Key of the configuration, what the released code has there, and how a difference is said of ours and theirs."""
ALWAYS = (
    "classifiers trained for all their epochs instead of stopped early (below +1 % after epoch 5)",
    "samples graded as 8-bit images instead of floats",
    "scales multiply the gradient of log-probabilities, for SportBalls instead of raw logits",
)
"""What differs whatever the configuration says."""


def published_rows(experiment: str) -> tuple[PublishedRow, ...]:
    """The published rows to show beside an experiment; empty for an experiment that the paper has not."""
    dataset = COMPARED_WITH.get(experiment)
    return tuple(row for row in ROWS if row.dataset == dataset)


def differences(
    experiment: str,
    *,
    features: str | None = None,
    num_samples: int | None = None,
    num_reference: int | None = None,
    image_size: int | None = None,
    num_steps: int | None = None,
    start: str | None = None,
    source: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """How the measured protocol differs from the published one, one phrase each.

    Any entry means that values are not comparable, only their order between methods. What is given as None is not
    compared. Empty for an experiment that the paper has not.

    Args:
        features: the protocol: `torcheval` as published, `inception` for clean-fid's, otherwise the extractor's name.
        num_reference: training images that the Fréchet distance compares with.
        num_steps: T.
        source: of the images, `dataset.source`: `sportballs` draws its own, not the authors' images.
        settings: the experiment's configuration, nested: how training and sampling differ from the released code's.
    """
    dataset = COMPARED_WITH.get(experiment)
    if dataset is None:
        return []
    protocol = PROTOCOLS[dataset]
    found = []
    if features == "inception":
        found.append("clean-fid's Inception and resizing instead of torcheval's")
    elif features is not None and features != protocol.features:
        found.append(f"features of the {features} network instead of Inception")
    for name, ours, theirs in (
        ("samples", num_samples, protocol.num_samples),
        ("pixels a side", image_size, protocol.image_size),
        ("diffusion steps", num_steps, protocol.num_steps),
    ):
        if None not in (ours, theirs) and ours != theirs:
            found.append(f"{ours:,} {name} instead of {theirs:,}")
    if num_reference is not None:
        theirs = f"{protocol.num_reference:,} drawn with replacement"
        found.append(f"{num_reference:,} reference images, each once, instead of {theirs}")
    if start is not None and start != protocol.start:
        found.append(f"start {start} instead of {protocol.start}")
    if source == "sportballs":
        found.append("images drawn anew, not the authors' own")
    return found + ([] if settings is None else _setting_differences(settings))


def _setting_differences(settings: Mapping[str, Any]) -> list[str]:
    found = []
    for key, published, words in SETTINGS:
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        untrained = key.startswith("ddpm.") and settings.get("ddpm", {}).get("pretrained")
        if value is not None and value != published and not untrained:
            found.append(words.format(value, published))
    return found + list(ALWAYS)


@dataclass(frozen=True)
class PublishedClaim:
    """What the paper says, and where."""

    text: str
    source: str


CLAIMS = {
    "falls_to_chance": PublishedClaim(
        "The accuracy of the non-robust classifier falls to chance in the first half of the steps.", "fig. 1"
    ),
    "falls_in_a_quarter": PublishedClaim("It does so in less than a quarter of the steps.", "fig. 1"),
    "x0_stays_accurate": PublishedClaim(
        "With the one-step denoised image x0 the non-robust classifier stays accurate there.", "fig. 1"
    ),
    "logit_non_robust_above_x0": PublishedClaim(
        "Logits: the non-robust classifier is more sensitive without x0 than with it.", "fig. 2"
    ),
    "logit_x0_above_robust": PublishedClaim(
        "Logits: the non-robust classifier with x0 is more sensitive than the robust one.", "fig. 2"
    ),
    "gradient_non_robust_above_x0": PublishedClaim(
        "Gradients: the non-robust classifier is more sensitive without x0 than with it.", "fig. 3"
    ),
    "gradient_x0_above_robust": PublishedClaim(
        "Gradients: the non-robust classifier with x0 is more sensitive than the robust one.", "fig. 3"
    ),
    "ema99_reaches_robust_early": PublishedClaim(
        "EMA 0.99 reaches the robust classifier's gradient stability in the first half of the steps.", "fig. 4"
    ),
    "ema99_reaches_robust": PublishedClaim(
        "EMA 0.99 reaches the robust classifier's gradient stability over all steps.", "fig. 4"
    ),
    "adam_worsens": PublishedClaim("With ADAM the gradient sensitivity grows with t.", "fig. 4"),
    "non_robust_fails": PublishedClaim(
        "Guidance by the plain non-robust classifier fails: it yields noise or no more of the class.", "figs. 5 to 8"
    ),
    "ema99_best_cfid": PublishedClaim(
        "The non-robust classifier with x0 and EMA 0.99 has the lowest class-conditional Fréchet distance.",
        "figs. 7, 8c",
    ),
    "ema99_beats_robust": PublishedClaim(
        "Its class-conditional Fréchet distance is lower than the robust classifier's.", "figs. 7, 8c"
    ),
    "ema99_accuracy": PublishedClaim("It makes far more samples of the class than no guidance.", "figs. 5, 8a"),
    "ema99_below_unconditional": PublishedClaim(
        "Its class-conditional Fréchet distance is lower than without guidance.", "tables 1 to 3"
    ),
}
