"""The figure of a likelihood: bits per dimension of each term of the bound, and the network's errors over t."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nrcg.csv_files import Row, read_csv
from nrcg.report.drawing import legend, new_figure, save_figure

COLUMNS = ("t", "bits_per_dim", "bits_per_dim_se", "num_images", "mse_eps", "mse_x0")
BITS, NOISE, IMAGE = "#0072b2", "#d1242f", "#009e73"


def save_likelihood_figure(folder: Path) -> list[Path]:
    """Draw likelihood.csv of a folder as bits_per_dim.png and .svg beside it; returns these."""
    rows = read_csv(folder / "likelihood.csv", COLUMNS)
    return save_figure(folder / "bits_per_dim", lambda: likelihood_figure(rows))


def likelihood_figure(rows: list[Row]) -> Figure:
    """Each term L_t in bits per dimension with its 95 % interval, and the mean squared errors of eps and x_0."""
    t, bits, error, _, noise, image = (np.array([row[name] for row in rows]) for name in COLUMNS)
    figure, (left, right) = new_figure(9.4, 3.6, 2, sharey=False)
    drawn = np.isfinite(bits) & (bits > 0)
    left.plot(t[drawn], bits[drawn], color=BITS, marker="o", markersize=2.5, linewidth=1.2)
    half = np.nan_to_num(1.96 * error[drawn])
    low = np.maximum(bits[drawn] - half, bits[drawn] / 10)  # a log axis has no room for less
    left.fill_between(t[drawn], low, bits[drawn] + half, color=BITS, alpha=0.2, linewidth=0)
    left.set(yscale="log", xlabel="$t$", ylabel="$L_t$, bits per dimension")
    for errors, color, label in ((noise, NOISE, r"$\epsilon$"), (image, IMAGE, "$x_0$")):
        known = np.isfinite(errors) & (errors > 0)
        right.plot(t[known], errors[known], color=color, linewidth=1.5, label=label)
    right.set(yscale="log", xlabel="$t$", ylabel="mean squared error")
    legend(right)
    return figure
