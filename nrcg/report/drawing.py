"""How figures are drawn: the project's style, a style for each method, lines, bands and axes.

Figures are drawn without pyplot, so no backend and no setting leaks into the caller's session, and equal numbers
give equal files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nrcg.csv_files import Row
from nrcg.data.pictures import sample_grid
from nrcg.files import atomic_write
from nrcg.layout import format_scale
from nrcg.report.best import best_per_method
from nrcg.report.columns import has_intervals, method_label, sort_methods

DPI = 150
SETTINGS = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "nrcg",  # element ids that do not change from run to run
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in every figure. Dash and marker tell methods apart without colour, too."""

    color: str
    dash: str | tuple = "-"
    marker: str = "o"


# Red, orange and blue as in the paper; the others from the Okabe-Ito palette, safe for colour-blind readers.
STYLES = {
    "unconditional": Style("#777777", "--", ""),
    "robust": Style("#0072b2", "-", "s"),
    "robust_x0": Style("#56b4e9", (0, (5, 1.5)), "D"),
    "non_robust": Style("#d1242f", "-", "X"),
    "non_robust_x0": Style("#e69f00", "-", "o"),
    "non_robust_x0_ema90": Style("#cc79a7", (0, (6, 1.5, 1.5, 1.5)), "^"),
    "non_robust_x0_ema99": Style("#009e73", "-", "v"),
    "non_robust_x0_adam": Style("#222222", (0, (1.5, 1.2)), "P"),
}
FURTHER = ("#8c6d1f", "#6a3d9a", "#17a2a2", "#8b4513", "#5b7f00", "#b0457b")


def method_styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style per method: STYLES, and for methods of one's own further colours in the order given."""
    styles = {}
    further = 0
    for method in sort_methods(methods):
        if method in STYLES:
            styles[method] = STYLES[method]
        else:
            styles[method] = Style(FURTHER[further % len(FURTHER)], (0, (3, 1, 1, 1)), "h")
            further += 1
    return styles


def render(draw: Callable[[], Figure], kind: str) -> bytes:
    """The bytes of a figure, drawn in the project's style.

    Args:
        draw: makes the figure.
        kind: `png` (150 dpi) or `svg`.
    """
    # No date and no version: equal figures are equal files.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's changes no figure
        matplotlib.rcParams.update(SETTINGS)
        draw().savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.08, metadata=metadata)
    return buffer.getvalue()


def save_figure(stem: Path, draw: Callable[[], Figure], kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure as STEM.png and STEM.svg; returns the files."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        atomic_write(path, render(draw, kind))
    return paths


def blank_figure(width: float, height: float) -> Figure:
    """A figure without axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_lines(lines: Mapping[str, np.ndarray], width: float, height: float) -> tuple[Figure, Axes]:
    """Images in rows, each row with its name.

    Args:
        lines: Name -> (N, H, W, C) uint8, N the same for all.
        width, height: Of the figure, inches.
    """
    grid = sample_grid(np.concatenate(list(lines.values())), len(next(iter(lines.values()))), 1)
    figure = blank_figure(width, height)
    axes = figure.subplots()
    axes.imshow(grid if grid.shape[2] == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    step = (grid.shape[0] - 1) / len(lines)
    axes.set_yticks([step * (line + 0.5) for line in range(len(lines))], list(lines), fontsize=8)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def new_figure(
    width: float = 6.4, height: float = 4.2, columns: int = 1, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    figure = blank_figure(width, height)
    axes = figure.subplots(1, columns, sharey=sharey and columns > 1, squeeze=False)[0]
    return figure, list(axes)


def text(text: str) -> str:
    """Text for matplotlib: x0 gets its hat, a dollar sign stays one."""
    return text.replace("$", r"\$").replace("+ x0", r"+ $\hat{x}_0$")


def series(rows: Sequence[Row], method: str, x: str, *columns: str) -> list[np.ndarray]:
    """Columns of one method as arrays (n,), ascending in x."""
    own = sorted((row for row in rows if row["method"] == method), key=lambda row: row[x])
    return [np.array([row[column] for row in own], float) for column in (x, *columns)]


def methods(rows: Sequence[Row]) -> list[str]:
    return sort_methods(row["method"] for row in rows)


def line(axes: Axes, x: np.ndarray, y: np.ndarray, style: Style, method: str, marker: str = "") -> None:
    axes.plot(
        x,
        y,
        color=style.color,
        linestyle=style.dash,
        linewidth=1.7,
        marker=marker or None,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=text(method_label(method)),
    )


def legend(axes: Axes, columns: int | None = None) -> None:
    """Below the axes, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = columns or (len(labels) if len(labels) <= 4 else 3)
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, handlelength=2.2)


def log_band(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A band around a positive mean that stays positive: up to mean + std, and as far down on the log axis.

    Args:
        mean, std: (n,) arrays, std >= 0.

    Returns:
        Lower and upper edge, mean^2 / (mean + std) and mean + std.
    """
    upper = mean + std
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = mean**2 / upper
    return lower, upper


def over_scale(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Style], column: str, factor: float = 1) -> None:
    """A line per method with its best scale ringed; unconditional sampling has no scale, so a level."""
    best = best_per_method(rows)
    guided = [method for method in best if method != "unconditional"]
    for method in guided:
        scale, value = series(rows, method, "scale", column)
        line(axes, scale, factor * value, styles[method], method, styles[method].marker)
        if has_intervals(rows, column):
            scale, low, high = series(rows, method, "scale", f"{column}_lo", f"{column}_hi")
            axes.vlines(scale, factor * low, factor * high, color=styles[method].color, linewidth=1, alpha=0.6)
        axes.plot(
            best[method]["scale"],
            factor * best[method][column],
            marker="o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=styles[method].color,
            markeredgewidth=1.2,
            linestyle="",
        )
    if "unconditional" in best and math.isfinite(best["unconditional"][column]):
        style = styles["unconditional"]
        level = factor * best["unconditional"][column]
        axes.axhline(level, color=style.color, linestyle="--", linewidth=1.4, label="unconditional")
    _scale_axis(axes, [row["scale"] for row in rows if row["method"] in guided])


def _scale_axis(axes: Axes, scales: Sequence[float]) -> None:
    """Logarithmic where the scales span a decade, with a linear stretch down to a scale of 0."""
    positive = [scale for scale in scales if scale > 0]
    if not positive or max(positive) < 10 * min(positive):
        return
    if min(scales) == 0:
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.3, max(positive) * 1.3)  # also where every value is nan
    plain_numbers(axes.xaxis)


def plain_numbers(axis: Axis, minor: bool = False) -> None:
    """Ticks such as 0.1, 1, 10 instead of powers; between them at 2 and 5 where the range is short."""

    def label(value: float, _position: int) -> str:
        return f"{value:g}"

    def between(value: float, _position: int) -> str:
        return f"{value:g}" if value > 0 and round(value / 10 ** math.floor(math.log10(value))) in (2, 5) else ""

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(FuncFormatter(between) if minor else NullFormatter())


def setup(row: Row) -> str:
    label = method_label(row["method"])
    return label if row["method"] == "unconditional" else f"{label}, s = {format_scale(row['scale'])}"
