"""Explanations compared: validity against closeness, realism against closeness with the Pareto front, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nrcg.csv_files import Row
from nrcg.report.drawing import FURTHER, legend, new_figure, picture_lines, save_figure

COLUMNS = ("method", "pair", "kind", "num_images", "num_skipped", "validity", "l1")
MARKERS = "osDv^PX*h"
GUIDE, JUDGE = "validity", "validity_judge"


def realism_column(rows: Sequence[Row]) -> str | None:
    """The class-conditional Fréchet distance; None where no row has one."""
    for name in rows[0]:
        if name.startswith(("cfid", "cfd_")) and not name.endswith(("_lo", "_hi")):
            return name
    return None


def front(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows that no other beats in both L1 and a distance, lower being better."""
    known = [row for row in rows if math.isfinite(row["l1"]) and math.isfinite(row[column])]

    def beaten(row: Row) -> bool:
        return any(
            other["l1"] <= row["l1"]
            and other[column] <= row[column]
            and (other["l1"], other[column]) != (row["l1"], row[column])
            for other in known
        )

    return [row for row in known if not beaten(row)]


def save_explanation_figures(
    rows: Sequence[Row], pictures: Mapping[str, Mapping[str, np.ndarray]], out: Path
) -> list[Path]:
    """Draw explanations.png, explanations.svg and pictures.png.

    Args:
        rows: Of explanations.csv.
        pictures: Way to explain -> `originals` and `images` (N, H, W, C) uint8.
        out: Folder.
    """
    drawn = save_figure(out / "explanations", lambda: explanations_figure(rows))
    return drawn + save_figure(out / "pictures", lambda: _pictures_figure(pictures), ["png"])


def explanations_figure(rows: Sequence[Row]) -> Figure:
    """Left validity against L1, filled by the guide and hollow by the judge; right realism against L1."""
    figure, (left, right) = new_figure(9.6, 4.0, 2, sharey=False)
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    realism = realism_column(rows)
    for number, method in enumerate(methods):
        color, marker = FURTHER[number % len(FURTHER)], MARKERS[number % len(MARKERS)]
        own = [row for row in rows if row["method"] == method]
        for column, face in ((GUIDE, color), (JUDGE, "none")):
            if column in rows[0]:
                _points(left, own, column, 100, color, marker, face, method if column == GUIDE else None)
        if realism is not None:
            _points(right, own, realism, 1, color, marker, color, None)
    left.set(xlabel="L1 distance to the image", ylabel="validity, %; filled: guide, hollow: judge", ylim=(-3, 103))
    if realism is not None:
        best = sorted(front(rows, realism), key=lambda row: row["l1"])
        right.plot([row["l1"] for row in best], [row[realism] for row in best], color="#999999", lw=1, zorder=0)
        right.set(xlabel="L1 distance to the image", ylabel=f"{realism}; line: Pareto front", yscale="log")
    legend(left)
    return figure


def _points(
    axes: Axes, rows: Sequence[Row], column: str, factor: float, color: str, marker: str, face: str, label: str | None
) -> None:
    """A point for each row, with the 95 % interval of its value."""
    for row in rows:
        value, low, high = (factor * row.get(f"{column}{end}", math.nan) for end in ("", "_lo", "_hi"))
        if not math.isfinite(value):
            continue
        axes.vlines(row["l1"], low, high, color=color, linewidth=0.9, alpha=0.7)
        axes.plot(
            row["l1"], value, marker=marker, color=color, markerfacecolor=face, markersize=6, linestyle="", label=label
        )
        label = None


def _pictures_figure(pictures: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """The images, and below them each way's explanations of them."""
    first = next(iter(pictures.values()))["originals"]
    columns = min(len(one["images"]) for one in pictures.values())
    lines = {"image": first[:columns]} | {name: one["images"][:columns] for name, one in pictures.items()}
    return picture_lines(lines, 2.0 + 0.5 * columns, 0.3 + 0.5 * len(lines))[0]
