"""The card of a published model: README.md of its folder on the hub, and the pipeline file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nrcg.csv_files import Row
from nrcg.report.best import best_per_method, best_rule
from nrcg.report.columns import frechet_columns, method_label
from nrcg.report.tables import format_count, format_interval, format_number, format_percent

PIPELINE_FILE = '''"""diffusers' custom pipeline of this folder, with classifier guidance, by the package nrcg."""

from nrcg import GuidedDDPMPipeline

__all__ = ["GuidedDDPMPipeline"]
'''
"""pipeline.py: what `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)` opens the model with."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        name: Heading, and the id that the examples open.
        license: By the hub's name, such as mit.
        shape: (C, H, W) of the images.
        scheduler: diffusers' class.
        training: Settings of the training, name to value; empty where none are known.
        metrics: Rows of a metrics.csv; None where there are none.
        classifiers: Folders under classifiers/ to the names of their classes.
        target: Class of the guided example, of the first classifier.
        scale: Of the guided example.
        beta: Of its EMA, per step.
    """

    name: str
    license: str
    shape: tuple[int, int, int]
    scheduler: str
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Row] | None = None
    classifiers: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    target: str | int | None = None
    scale: float = 5.0
    beta: float = 0.99

    def text(self) -> str:
        """The card, as Markdown with the hub's header."""
        parts = [self._header(), f"# {self.name}", self._what(), "![Samples](samples.png)"]
        parts += ["## Use", self._use()]
        if self.metrics:
            parts += ["## Guided samples, measured", self._table()]
        if self.training:
            rows = [f"| {name} | {_cell(value)} |" for name, value in self.training.items()]
            parts += ["## Training", "\n".join(["| | |", "|---|---|", *rows])]
        return "\n\n".join([*parts, "## Licence", f"{self.license}."]) + "\n"

    def _header(self) -> str:
        lines = [
            f"license: {self.license}",
            "library_name: diffusers",
            "pipeline_tag: unconditional-image-generation",
            "tags: [diffusion, unconditional-image-generation, classifier-guidance, nrcg]",
        ]
        return "\n".join(["---", *lines, "---"])

    def _what(self) -> str:
        channels, height, width = self.shape
        colours = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
        guides = ""
        if self.classifiers:
            guides = " Beside it lie classifiers that guide it or judge what it draws: " + (
                "; ".join(f"`classifiers/{name}`{_classes(classes)}" for name, classes in self.classifiers.items())
                + "."
            )
        return (
            f"An unconditional diffusion model of images of {height} x {width} pixels, {colours}, with"
            f" {self.scheduler}."
            " Any classifier of clean images guides it towards a class, by the one-step denoised image and a"
            f" gradient smoothed over the steps (arXiv 2507.00687).{guides}"
        )

    def _use(self) -> str:
        guided = ["guidance = None  # or ClassifierGuidance(any classifier of images in [-1, 1], target)"]
        fetch = ""
        if self.classifiers:
            first = next(iter(self.classifiers))
            fetch = f'folder = snapshot_download("{self.name}")  # or a local folder\n'
            guided = [
                f'classifier = load_classifier(f"{{folder}}/classifiers/{first}")',
                f"guidance = ClassifierGuidance("
                f"classifier, {json.dumps(self.target)}, scale={self.scale:g}, stabilizer=EMA({self.beta:.3g}))",
            ]
        where = "folder" if fetch else f'"{self.name}"'
        snapshot = "from huggingface_hub import snapshot_download\n" if fetch else ""
        code = [
            f"{snapshot}from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline, load_classifier\n",
            f"{fetch}pipe = GuidedDDPMPipeline.from_pretrained({where})",
            *guided,
            "images = pipe(num_samples=16, seed=0, guidance=guidance).images",
        ]
        plain = (
            f'DiffusionPipeline.from_pretrained("{self.name}", custom_pipeline="{self.name}", trust_remote_code=True)'
        )
        return (
            "```python\n" + "\n".join(code) + "\n```\n\n"
            f"Plain diffusers opens it with `DDPMPipeline.from_pretrained`, and with guidance as\n`{plain}`."
        )

    def _table(self) -> str:
        """Each method at its best scale."""
        rows = self.metrics or []
        everything, conditional = frechet_columns(rows)
        _, rule = best_rule(rows)
        head = ["method", "scale", "samples", "accuracy, judge, %", conditional, everything]
        lines = [" | ".join(head), " | ".join(["---"] * len(head))]
        for method, row in best_per_method(rows).items():
            cells = [
                method_label(method),
                format_number(row["scale"], 3),
                format_count(row["num_samples"]),
                f"{format_percent(row['accuracy_judge'])} ({format_interval(row, 'accuracy_judge', percent=True)})",
                *(f"{format_number(row[name])} ({format_interval(row, name)})" for name in (conditional, everything)),
            ]
            lines.append(" | ".join(cells).replace(" ()", ""))
        return (
            "\n".join(f"| {line} |" for line in lines)
            + f"\n\n{rule[0].upper()}{rule[1:]}. In brackets, 95 % intervals."
        )


def _classes(classes: Sequence[str] | None) -> str:
    return "" if not classes else f" ({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
