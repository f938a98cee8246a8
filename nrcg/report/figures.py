"""The figures of the comparison, one function each, named after what they show.

| file | the paper's figure |
|---|---|
| forward_accuracy | 1 |
| logit_sensitivity | 2 |
| gradient_sensitivity | 3 |
| stabilizers | 4 |
| accuracy_vs_scale | 5, 8a |
| fid_vs_scale | 6, 8b |
| cfid_vs_scale | 7, 8c |
| pareto | - |
| best_samples | tables 1 to 3 |

Figures are drawn without pyplot, so no backend and no setting leaks into the caller's session, and equal numbers
give equal files.
"""

from __future__ import annotations

import io
import math
import os
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
from nrcg.data.pictures import load_samples, sample_grid
from nrcg.files import atomic_write
from nrcg.layout import format_scale
from nrcg.report.best import best_per_method, best_rule, pareto_front
from nrcg.report.columns import (
    frechet_columns,
    has_intervals,
    headline_protocol,
    method_label,
    read_forward,
    read_metrics,
    sort_methods,
)
from nrcg.report.tables import format_percent

DPI = 150
UNSTABILIZED = ("robust", "robust_x0", "non_robust", "non_robust_x0")
"""Methods of figs. 1 to 3; fig. 4 adds the stabilizers."""
BEST_COLUMNS = 12
"""Samples per row of best_samples."""
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


def make_figures(
    forward_csv: str | os.PathLike,
    metrics_csv: str | os.PathLike,
    samples_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    target: str,
    num_classes: int,
) -> list[Path]:
    """Write every figure as PNG and SVG.

    Args:
        samples_dir: holds METHOD/scaleSCALE/shardNNNN.npy; a method without is left out of best_samples.
        target: name of the class to generate.
        num_classes: K; the chance level drawn is 1 / K.

    Returns:
        The files written.

    Raises:
        DataError: a CSV file is missing or broken.
    """
    forward, metrics = read_forward(forward_csv), read_metrics(metrics_csv)
    styles = method_styles([row["method"] for row in [*forward, *metrics]])
    out = Path(out_dir)
    written = []
    for name, draw in (
        ("forward_accuracy", lambda: forward_accuracy(forward, styles, num_classes=num_classes)),
        ("logit_sensitivity", lambda: logit_sensitivity(forward, styles)),
        ("gradient_sensitivity", lambda: gradient_sensitivity(forward, styles)),
        ("stabilizers", lambda: stabilizers(forward, styles)),
        ("accuracy_vs_scale", lambda: accuracy_vs_scale(metrics, styles, target=target)),
        ("fid_vs_scale", lambda: fid_vs_scale(metrics, styles)),
        ("cfid_vs_scale", lambda: cfid_vs_scale(metrics, styles, target=target)),
        ("pareto", lambda: pareto(metrics, styles, target=target)),
        ("best_samples", lambda: best_samples(metrics, samples_dir, target=target)),
    ):
        for kind in ("png", "svg"):
            path = out / f"{name}.{kind}"
            atomic_write(path, render(draw, kind))
            written.append(path)
    return written


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


def _figure(width: float = 6.4, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=columns > 1, squeeze=False)[0]
    return figure, list(axes)


def _text(text: str) -> str:
    """Text for matplotlib: x0 gets its hat, a dollar sign stays one."""
    return text.replace("$", r"\$").replace("+ x0", r"+ $\hat{x}_0$")


def _series(rows: Sequence[Row], method: str, x: str, *columns: str) -> list[np.ndarray]:
    """Columns of one method as arrays (n,), ascending in x."""
    own = sorted((row for row in rows if row["method"] == method), key=lambda row: row[x])
    return [np.array([row[column] for row in own], float) for column in (x, *columns)]


def _methods(rows: Sequence[Row]) -> list[str]:
    return sort_methods(row["method"] for row in rows)


def forward_accuracy(rows: Sequence[Row], styles: Mapping[str, Style], *, num_classes: int) -> Figure:
    """Fig. 1: validation accuracy of the classifiers over the steps of the forward process."""
    figure, (axes,) = _figure()
    for method in _methods(rows):
        if method in UNSTABILIZED:
            t, accuracy = _series(rows, method, "t", "accuracy")
            _line(axes, t, 100 * accuracy, styles[method], method)
    axes.axhline(100 / num_classes, color="#777777", linestyle=":", linewidth=1, label=f"chance (1/{num_classes})")
    axes.set(xlabel="diffusion step $t$", ylabel="accuracy on noised validation images, %", ylim=(0, 102))
    legend(axes)
    return figure


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: Style, method: str, marker: str = "") -> None:
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
        label=_text(method_label(method)),
    )


def legend(axes: Axes, columns: int | None = None) -> None:
    """Below the axes, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    columns = columns or (len(labels) if len(labels) <= 4 else 3)
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, handlelength=2.2)


def logit_sensitivity(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 2: logit sensitivity (eq. 3) over the steps."""
    return _sensitivity(rows, [name for name in _methods(rows) if name in UNSTABILIZED], styles, "logit")


def gradient_sensitivity(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 3: gradient sensitivity (eqs. 4, 6) over the steps."""
    return _sensitivity(rows, [name for name in _methods(rows) if name in UNSTABILIZED], styles, "gradient")


def stabilizers(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 4: gradient sensitivity of the stabilized gradients (eqs. 7, 8), beside those of fig. 3."""
    return _sensitivity(rows, _methods(rows), styles, "gradient")


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


def _sensitivity(rows: Sequence[Row], methods: Sequence[str], styles: Mapping[str, Style], quantity: str) -> Figure:
    figure, (axes,) = _figure()
    for method in methods:
        t, mean, std = _series(rows, method, "t", f"{quantity}_sensitivity_mean", f"{quantity}_sensitivity_std")
        mean = np.where(mean > 0, mean, np.nan)  # a zero has no place on a log axis
        lower, upper = log_band(mean, np.nan_to_num(std))
        color = styles[method].color
        axes.fill_between(t, lower, upper, color=color, alpha=0.13 if len(methods) < 5 else 0.08, linewidth=0)
        _line(axes, t, mean, styles[method], method)
    if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):  # an empty log axis cannot be drawn
        axes.set_yscale("log")
    axes.set(xlabel="diffusion step $t$", ylabel=f"{quantity} sensitivity (mean, band of one std)")
    legend(axes)
    return figure


def accuracy_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Figs. 5 and 8a: share of samples in the target class, by the judge and by the classifier that guides."""
    figure, panels = _figure(9.2, 4.4, columns=2)
    for axes, column, words in zip(
        panels,
        ("accuracy_judge", "accuracy_guide"),
        ("by the judge, which never guides", "by the guiding classifier (as published)"),
        strict=True,
    ):
        _over_scale(axes, rows, styles, column, factor=100)
        axes.set_title(words, fontsize=9.5)
        axes.set(xlabel="guidance scale $s$", ylim=(-2, 104))
    panels[0].set_ylabel(_text(f"samples classified as {target}, %"))
    legend(panels[1], columns=4)
    return figure


def fid_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Figs. 6 and 8b: Fréchet distance to all training images."""
    return _distance_vs_scale(rows, styles, frechet_columns(rows)[0], "all training images")


def cfid_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Figs. 7 and 8c: Fréchet distance to the training images of the target class."""
    return _distance_vs_scale(rows, styles, frechet_columns(rows)[1], f"training images of {target}")


def _distance_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], column: str, reference: str) -> Figure:
    figure, (axes,) = _figure(6.4, 4.4)
    _over_scale(axes, rows, styles, column)
    values = [row[column] for row in rows if math.isfinite(row[column]) and row[column] > 0]
    if values and max(values) > 10 * min(values):  # noise would flatten everything else
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    network = headline_protocol(rows)
    kind = {"inception": "Inception", "torcheval": "torcheval's Inception"}.get(network, network)
    axes.set(xlabel="guidance scale $s$", ylabel=_text(f"Fréchet distance, {kind} features ({column})"))
    axes.set_title(_text(f"to {reference}; lower is better, ring: best scale by {best_rule(rows)[0]}"), fontsize=9)
    legend(axes)
    return figure


def _over_scale(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Style], column: str, factor: float = 1) -> None:
    """A line per method with its best scale ringed; unconditional sampling has no scale, so a level."""
    best = best_per_method(rows)
    guided = [method for method in best if method != "unconditional"]
    for method in guided:
        scale, value = _series(rows, method, "scale", column)
        _line(axes, scale, factor * value, styles[method], method, styles[method].marker)
        if has_intervals(rows, column):
            scale, low, high = _series(rows, method, "scale", f"{column}_lo", f"{column}_hi")
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
    _plain_numbers(axes.xaxis)


def _plain_numbers(axis: Axis, minor: bool = False) -> None:
    """Ticks such as 0.1, 1, 10 instead of powers; between them at 2 and 5 where the range is short."""

    def label(value: float, _position: int) -> str:
        return f"{value:g}"

    def between(value: float, _position: int) -> str:
        return f"{value:g}" if value > 0 and round(value / 10 ** math.floor(math.log10(value))) in (2, 5) else ""

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(FuncFormatter(between) if minor else NullFormatter())


def pareto(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Judge accuracy against the class-conditional distance of every setting, and the front that none other beats."""
    figure, (axes,) = _figure(6.4, 4.4)
    conditional = frechet_columns(rows)[1]
    for method in _methods(rows):
        scale, accuracy, distance = _series(rows, method, "scale", "accuracy_judge", conditional)
        marker = styles[method].marker or "*"
        label = _text(method_label(method))
        axes.plot(100 * accuracy, distance, marker, color=styles[method].color, markersize=6, label=label)
        if has_intervals(rows, conditional) and has_intervals(rows, "accuracy_judge"):
            names = (f"{conditional}_lo", f"{conditional}_hi", "accuracy_judge_lo", "accuracy_judge_hi")
            _, low, high, left, right = _series(rows, method, "scale", *names)
            axes.vlines(100 * accuracy, low, high, color=styles[method].color, linewidth=0.8, alpha=0.5)
            axes.hlines(distance, 100 * left, 100 * right, color=styles[method].color, linewidth=0.8, alpha=0.5)
        for x, y, s in zip(100 * accuracy, distance, scale, strict=True):
            if method != "unconditional" and math.isfinite(x) and math.isfinite(y):
                axes.annotate(format_scale(s), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6.5)
    front = pareto_front(rows)
    axes.plot(
        [100 * row["accuracy_judge"] for row in front],
        [row[conditional] for row in front],
        color="#444444",
        linestyle=":",
        linewidth=1.2,
        zorder=0,
        label="Pareto front",
    )
    values = [row[conditional] for row in rows if math.isfinite(row[conditional]) and row[conditional] > 0]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    axes.set(xlabel=_text(f"samples that the judge takes for {target}, %"), ylabel=conditional, xlim=(-3, 106))
    axes.set_title("every method and scale (numbers); best towards the lower right", fontsize=9)
    legend(axes)
    return figure


def best_samples(rows: Sequence[Row], samples_dir: str | os.PathLike, *, target: str) -> Figure:
    """Tables 1 to 3: samples of each method at its best scale, one seed per column."""
    conditional = frechet_columns(rows)[1]
    strips = []
    for method, row in best_per_method(rows).items():
        images = load_samples(samples_dir, method, row["scale"], BEST_COLUMNS)
        if images is not None:
            strips.append((row, sample_grid(images, BEST_COLUMNS, max(1, images.shape[1] // 24))))
    if not strips:
        figure, (axes,) = _figure(6.4, 1.2)
        axes.axis("off")
        axes.text(0.5, 0.5, "no samples were kept", ha="center", va="center", transform=axes.transAxes)
        return figure
    figure = Figure(figsize=(10.2, 0.66 * len(strips) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (row, strip) in zip(panels, strips, strict=True):
        axes.imshow(strip if strip.shape[-1] == 3 else strip[..., 0], cmap="gray", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(
            _text(f"{_setup(row)}\n{format_percent(row['accuracy_judge'])} % {target}, {conditional} ")
            + (f"{row[conditional]:.3g}" if math.isfinite(row[conditional]) else "-"),
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
    panels[0].set_title("each method at its best scale; samples of a column share their seed", fontsize=9)
    return figure


def _setup(row: Row) -> str:
    label = method_label(row["method"])
    return label if row["method"] == "unconditional" else f"{label}, s = {format_scale(row['scale'])}"


def training_loss(rows: Sequence[Row]) -> Figure:
    """DDPM training and validation loss (mean squared error of the predicted noise) over the epochs."""
    figure, (axes,) = _figure(6.4, 3.4)
    for column, label, color, dash in (
        ("train_loss", "training", "#0072b2", "-"),
        ("val_loss", "validation", "#d1242f", (0, (5, 1.5))),
    ):
        points = [(row["epoch"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
        if points:
            marker = "o" if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker=marker, ms=3.5, label=label)
    values = [row[name] for row in rows for name in ("train_loss", "val_loss") if row.get(name, math.nan) > 0]
    if values and max(values) > 5 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    axes.set(xlabel="epoch", ylabel="noise prediction loss (MSE)")
    axes.legend()
    return figure


def classifier_accuracy(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """Validation accuracy of the trained classifiers over the steps of the forward process.

    Args:
        tables: role (non_robust, robust, judge) -> rows with t and accuracy in [0, 1].
    """
    figure, (axes,) = _figure(6.4, 3.4)
    for role, rows in tables.items():
        style = STYLES.get(role, Style("#777777", "--"))
        points = sorted((row["t"], 100 * row["accuracy"]) for row in rows)
        axes.plot(*zip(*points, strict=True), color=style.color, linestyle=style.dash, lw=1.7, label=method_label(role))
    axes.set(xlabel="diffusion step $t$", ylabel="validation accuracy, %", ylim=(0, 102))
    legend(axes)
    return figure
