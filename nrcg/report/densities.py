"""Distributions whose density is known: bound and ODE likelihood beside the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nrcg.csv_files import Row
from nrcg.report.best import differ
from nrcg.report.drawing import blank_figure, legend, save_figure
from nrcg.report.studies import Study, figure_address, interval_text
from nrcg.report.tables import format_number

COLUMNS = ("density", "objective", "loss", "entropy", "true", "bound", "bound_gap", "flow", "flow_gap")
PERFECT = "exact"
"""The network that knows the density, among the objectives."""
BOUND, FLOW = "#0072b2", "#d1242f"
SHOWN = 1.15
"""Half of the side of what is shown of the plane."""


def save_density_figures(rows: Sequence[Row], points: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> list[Path]:
    """Draw densities.png, densities.svg and points.png.

    Args:
        rows: Of densities.csv.
        points: Distribution -> `true` and each objective -> (N, 2) points drawn.
        out: Folder.
    """
    drawn = save_figure(out / "densities", lambda: densities_figure(rows))
    return drawn + save_figure(out / "points", lambda: points_figure(points), ["png"])


def densities_figure(rows: Sequence[Row]) -> Figure:
    """What bound and ODE exceed the true cross-entropy by, in bits per dimension, for each objective."""
    names = list(dict.fromkeys(str(row["density"]) for row in rows))
    objectives = list(dict.fromkeys(str(row["objective"]) for row in rows))
    figure = blank_figure(3.1 * len(names) + 1.2, 0.6 + 0.33 * len(objectives))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for column, color, label, shift in (("bound_gap", BOUND, "bound", -0.12), ("flow_gap", FLOW, "ODE", 0.12)):
            own = [row for row in rows if row["density"] == name and math.isfinite(row[column])]
            y = [objectives.index(str(row["objective"])) + shift for row in own]
            value, low, high = (np.array([row[f"{column}{end}"] for row in own]) for end in ("", "_lo", "_hi"))
            axes.errorbar(
                value, y, xerr=[value - low, high - value], fmt="o", color=color, markersize=4, lw=1, label=label
            )
        axes.axvline(0, color="#777777", linewidth=1)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("bits per dimension above the truth")
        axes.set_yticks(range(len(objectives)), objectives)
    panels[0].invert_yaxis()
    legend(panels[0])
    return figure


def points_figure(points: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """A line of scatter plots for each distribution: its own points, and those that each network draws."""
    columns = list(dict.fromkeys(name for drawn in points.values() for name in drawn))
    figure = blank_figure(1.35 * len(columns), 1.5 * len(points))
    grid = figure.subplots(len(points), len(columns), squeeze=False)
    for line, (name, drawn) in zip(grid, points.items(), strict=True):
        for axes, column in zip(line, columns, strict=True):
            x = drawn.get(column, np.zeros((0, 2)))
            axes.scatter(x[:, 0], x[:, 1], s=0.8, color="#777777" if column == "true" else BOUND, linewidths=0)
            axes.set(xlim=(-SHOWN, SHOWN), ylim=(-SHOWN, SHOWN), xticks=[], yticks=[], aspect="equal")
            axes.set_title(column, fontsize=6.5)
            axes.grid(False)
        line[0].set_ylabel(name.replace("_", " "), fontsize=7.5)
    return figure


def density_study(rows: Sequence[Row], folder: Path) -> Study:
    """The section of a report: verdicts, table, figures."""
    columns = ("entropy", "true", "bound", "bound_gap", "flow", "flow_gap")
    lines = [
        [
            (f"{row['density']}, {row['objective']}", ""),
            *((format_number(row[name], 3), interval_text(row, name)) for name in columns),
        ]
        for row in rows
    ]
    text = (
        "A small network learns each distribution by each objective, in equally many steps. All numbers are bits per "
        "dimension; `true` is the cross-entropy of the test points under the true density, and the gaps are "
        "differences on the same points. `exact` is a network that knows the density: its gap is due to the number of "
        "steps alone."
    )
    pictures = [
        (figure_address(folder, "densities"), "What bound and ODE exceed the truth by, with 95 % intervals."),
        (figure_address(folder, "points"), "Points of the distribution, and points that each network draws."),
    ]
    titles = ["distribution, objective", "entropy", "true", "bound", "bound − true", "ODE", "ODE − true"]
    return Study("densities", "Known densities", [text, *verdicts(rows)], pictures, titles, lines)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each distribution the objective of the tightest bound, and those that cannot be told from it."""
    said = []
    for name in dict.fromkeys(str(row["density"]) for row in rows):
        own = [row for row in rows if row["density"] == name and row["objective"] != PERFECT]
        best = min(own, key=lambda row: row["bound_gap"])
        ties = [str(row["objective"]) for row in own if row is not best and not differ(row, best, "bound_gap")]
        end = f"; the 95 % intervals do not tell it from {', '.join(ties)}" if ties else ", told from all others"
        gap = format_number(best["bound_gap"], 3)
        said.append(f"{name}: the tightest bound is that of {best['objective']}, {gap} above the truth{end}.")
    return said
