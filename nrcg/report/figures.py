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

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nrcg.csv_files import Row
from nrcg.data.pictures import load_samples, sample_grid
from nrcg.layout import format_scale
from nrcg.report.best import best_per_method, best_rule, pareto_front
from nrcg.report.columns import (
    frechet_columns,
    has_intervals,
    headline_protocol,
    method_label,
    read_forward,
    read_metrics,
)
from nrcg.report.drawing import (
    STYLES,
    Style,
    legend,
    line,
    log_band,
    method_styles,
    methods,
    new_figure,
    over_scale,
    plain_numbers,
    save_figure,
    series,
    setup,
    text,
)
from nrcg.report.tables import format_percent

UNSTABILIZED = ("robust", "robust_x0", "non_robust", "non_robust_x0")
"""Methods of figs. 1 to 3; fig. 4 adds the stabilizers."""
BEST_COLUMNS = 12
"""Samples per row of best_samples."""


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
        written += save_figure(out / name, draw)
    return written


def forward_accuracy(rows: Sequence[Row], styles: Mapping[str, Style], *, num_classes: int) -> Figure:
    """Fig. 1: validation accuracy of the classifiers over the steps of the forward process."""
    figure, (axes,) = new_figure()
    for method in methods(rows):
        if method in UNSTABILIZED:
            t, accuracy = series(rows, method, "t", "accuracy")
            line(axes, t, 100 * accuracy, styles[method], method)
    axes.axhline(100 / num_classes, color="#777777", linestyle=":", linewidth=1, label=f"chance (1/{num_classes})")
    axes.set(xlabel="diffusion step $t$", ylabel="accuracy on noised validation images, %", ylim=(0, 102))
    legend(axes)
    return figure


def logit_sensitivity(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 2: logit sensitivity (eq. 3) over the steps."""
    return _sensitivity(rows, [name for name in methods(rows) if name in UNSTABILIZED], styles, "logit")


def gradient_sensitivity(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 3: gradient sensitivity (eqs. 4, 6) over the steps."""
    return _sensitivity(rows, [name for name in methods(rows) if name in UNSTABILIZED], styles, "gradient")


def stabilizers(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Fig. 4: gradient sensitivity of the stabilized gradients (eqs. 7, 8), beside those of fig. 3."""
    return _sensitivity(rows, methods(rows), styles, "gradient")


def _sensitivity(rows: Sequence[Row], methods: Sequence[str], styles: Mapping[str, Style], quantity: str) -> Figure:
    figure, (axes,) = new_figure()
    for method in methods:
        t, mean, std = series(rows, method, "t", f"{quantity}_sensitivity_mean", f"{quantity}_sensitivity_std")
        mean = np.where(mean > 0, mean, np.nan)  # a zero has no place on a log axis
        lower, upper = log_band(mean, np.nan_to_num(std))
        color = styles[method].color
        axes.fill_between(t, lower, upper, color=color, alpha=0.13 if len(methods) < 5 else 0.08, linewidth=0)
        line(axes, t, mean, styles[method], method)
    if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):  # an empty log axis cannot be drawn
        axes.set_yscale("log")
    axes.set(xlabel="diffusion step $t$", ylabel=f"{quantity} sensitivity (mean, band of one std)")
    legend(axes)
    return figure


def accuracy_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Figs. 5 and 8a: share of samples in the target class, by the judge and by the classifier that guides."""
    figure, panels = new_figure(9.2, 4.4, columns=2)
    for axes, column, words in zip(
        panels,
        ("accuracy_judge", "accuracy_guide"),
        ("by the judge, which never guides", "by the guiding classifier (as published)"),
        strict=True,
    ):
        over_scale(axes, rows, styles, column, factor=100)
        axes.set_title(words, fontsize=9.5)
        axes.set(xlabel="guidance scale $s$", ylim=(-2, 104))
    panels[0].set_ylabel(text(f"samples classified as {target}, %"))
    legend(panels[1], columns=4)
    return figure


def fid_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Figs. 6 and 8b: Fréchet distance to all training images."""
    return _distance_vs_scale(rows, styles, frechet_columns(rows)[0], "all training images")


def cfid_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Figs. 7 and 8c: Fréchet distance to the training images of the target class."""
    return _distance_vs_scale(rows, styles, frechet_columns(rows)[1], f"training images of {target}")


def _distance_vs_scale(rows: Sequence[Row], styles: Mapping[str, Style], column: str, reference: str) -> Figure:
    figure, (axes,) = new_figure(6.4, 4.4)
    over_scale(axes, rows, styles, column)
    values = [row[column] for row in rows if math.isfinite(row[column]) and row[column] > 0]
    if values and max(values) > 10 * min(values):  # noise would flatten everything else
        axes.set_yscale("log")
        plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    network = headline_protocol(rows)
    kind = {"inception": "Inception", "torcheval": "torcheval's Inception"}.get(network, network)
    axes.set(xlabel="guidance scale $s$", ylabel=text(f"Fréchet distance, {kind} features ({column})"))
    axes.set_title(text(f"to {reference}; lower is better, ring: best scale by {best_rule(rows)[0]}"), fontsize=9)
    legend(axes)
    return figure


def pareto(rows: Sequence[Row], styles: Mapping[str, Style], *, target: str) -> Figure:
    """Judge accuracy against the class-conditional distance of every setting, and the front that none other beats."""
    figure, (axes,) = new_figure(6.4, 4.4)
    conditional = frechet_columns(rows)[1]
    for method in methods(rows):
        scale, accuracy, distance = series(rows, method, "scale", "accuracy_judge", conditional)
        marker = styles[method].marker or "*"
        label = text(method_label(method))
        axes.plot(100 * accuracy, distance, marker, color=styles[method].color, markersize=6, label=label)
        if has_intervals(rows, conditional) and has_intervals(rows, "accuracy_judge"):
            names = (f"{conditional}_lo", f"{conditional}_hi", "accuracy_judge_lo", "accuracy_judge_hi")
            _, low, high, left, right = series(rows, method, "scale", *names)
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
        plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    axes.set(xlabel=text(f"samples that the judge takes for {target}, %"), ylabel=conditional, xlim=(-3, 106))
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
        figure, (axes,) = new_figure(6.4, 1.2)
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
            text(f"{setup(row)}\n{format_percent(row['accuracy_judge'])} % {target}, {conditional} ")
            + (f"{row[conditional]:.3g}" if math.isfinite(row[conditional]) else "-"),
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
    panels[0].set_title("each method at its best scale; samples of a column share their seed", fontsize=9)
    return figure


def training_loss(rows: Sequence[Row]) -> Figure:
    """DDPM training and validation loss (mean squared error of the predicted noise) over the epochs."""
    figure, (axes,) = new_figure(6.4, 3.4)
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
        plain_numbers(axes.yaxis, minor=max(values) < 100 * min(values))
    axes.set(xlabel="epoch", ylabel="noise prediction loss (MSE)")
    axes.legend()
    return figure


def classifier_accuracy(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """Validation accuracy of the trained classifiers over the steps of the forward process.

    Args:
        tables: role (non_robust, robust, judge) -> rows with t and accuracy in [0, 1].
    """
    figure, (axes,) = new_figure(6.4, 3.4)
    for role, rows in tables.items():
        style = STYLES.get(role, Style("#777777", "--"))
        points = sorted((row["t"], 100 * row["accuracy"]) for row in rows)
        axes.plot(*zip(*points, strict=True), color=style.color, linestyle=style.dash, lw=1.7, label=method_label(role))
    axes.set(xlabel="diffusion step $t$", ylabel="validation accuracy, %", ylim=(0, 102))
    legend(axes)
    return figure
