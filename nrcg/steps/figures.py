"""The paper's figures."""

from __future__ import annotations

from pathlib import Path

from nrcg.config import ReportStep
from nrcg.report.figures import make_figures


def draw_figures(settings: ReportStep, *, forward: Path, metrics: Path, samples: Path, out: Path) -> list[Path]:
    """Draw every figure as PNG and SVG.

    Args:
        settings: The experiment's settings.
        forward: forward.csv.
        metrics: metrics.csv.
        samples: results/<experiment>/samples.
        out: Folder of the figures.

    Returns:
        The files written.
    """
    return make_figures(forward, metrics, samples, out, target=settings.target, num_classes=len(settings.classes))
