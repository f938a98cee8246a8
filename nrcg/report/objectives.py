"""A grid of training objectives: which is best for what, as far as the intervals tell, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nrcg.config import TARGETS, WEIGHTINGS
from nrcg.csv_files import Row
from nrcg.report.best import differ
from nrcg.report.columns import frechet_columns
from nrcg.report.drawing import blank_figure, picture_lines, save_figure
from nrcg.report.tables import format_number, format_percent

LABELS = {"sample": "x0", "epsilon": "eps", "v_prediction": "v", "score": "score", "mean": "mean"}


@dataclass(frozen=True)
class Question:
    """What objectives are compared in.

    Attributes:
        title: What for.
        column: Of objectives.csv.
        words: What the column says.
        highest: Whether more is better.
    """

    title: str
    column: str
    words: str
    highest: bool = False

    def shown(self, value: float) -> str:
        """A value as text."""
        if self.column.startswith("accuracy"):
            return f"{format_percent(value)} %"
        return format_number(value, 3)


def questions(rows: Sequence[Row]) -> list[Question]:
    """What the objectives of a table are compared in."""
    everything, conditional = frechet_columns(rows)
    return [
        Question("likelihood", "bits_per_dim", "bits per dimension"),
        Question("samples", everything, f"{everything} of unguided samples"),
        Question("guided samples", conditional, f"{conditional} of guided samples"),
        Question("guided accuracy", "accuracy_judge", "share of the target among guided samples", highest=True),
        Question("smooth gradients", "gradient_sensitivity", "gradient sensitivity through x0hat"),
        Question("predicting the noise", "val_loss", "mean squared error of the noise"),
    ]


def best_objectives(rows: Sequence[Row], question: Question) -> tuple[Row | None, list[Row]]:
    """The best objective, and those that the 95 % intervals do not tell from it; None where no value is finite."""
    sign = -1 if question.highest else 1
    known = [row for row in rows if math.isfinite(row[question.column])]
    if not known:
        return None, []
    best = min(known, key=lambda row: sign * row[question.column])
    return best, [row for row in known if row is not best and not differ(row, best, question.column)]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each question: the best objective, and how many cannot be told from it."""
    said = []
    for question in questions(rows):
        best, ties = best_objectives(rows, question)
        if best is None:
            said.append(f"Best for {question.title}: none, no objective gives a finite value.")
            continue
        text = (
            f"Best for {question.title}: {best['objective']}, {question.words} {question.shown(best[question.column])}"
        )
        others = len(rows) - 1
        if f"{question.column}_lo" not in best:
            text += "; without an interval"
        elif not ties:
            text += f"; the 95 % intervals tell it from the {others} others"
        elif len(ties) == others:
            text += f"; the 95 % intervals tell it from none of the {others} others"
        else:
            names = ", ".join(str(row["objective"]) for row in ties)
            text += f"; the 95 % intervals do not tell it from {names}"
        said.append(f"{text}.")
    return said


def save_objective_figures(rows: Sequence[Row], samples: Mapping[str, np.ndarray], out: Path) -> list[Path]:
    """Draw objectives.png, objectives.svg and samples.png.

    Args:
        rows: Of objectives.csv.
        samples: Objective -> (N, H, W, C) uint8, the unguided samples and then as many guided ones.
        out: Folder.

    Returns:
        The files written.
    """
    drawn = save_figure(out / "objectives", lambda: objectives_figure(rows))
    return drawn + save_figure(out / "samples", lambda: _samples_figure(samples), ["png"])


def objectives_figure(rows: Sequence[Row]) -> Figure:
    """A panel for each question: what is predicted against the weighting, coloured by rank."""
    predicts = [name for name in TARGETS if any(row["predicts"] == name for row in rows)]
    weightings = [name for name in WEIGHTINGS if any(row["weighting"] == name for row in rows)]
    figure = blank_figure(3.6 + 1.7 * len(predicts), 1.6 + 0.75 * len(weightings))
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, question in zip(panels, questions(rows), strict=True):
        _heat_map(axes, rows, question, predicts, weightings)
    return figure


def _heat_map(
    axes: Axes, rows: Sequence[Row], question: Question, predicts: Sequence[str], weightings: Sequence[str]
) -> None:
    values = np.full((len(weightings), len(predicts)), np.nan)
    places = {}
    for row in rows:
        places[row["objective"]] = weightings.index(row["weighting"]), predicts.index(row["predicts"])
        values[places[row["objective"]]] = row[question.column]
    known = np.isfinite(values)
    rank = np.full(values.shape, np.nan)
    order = np.argsort(np.argsort(-values[known] if question.highest else values[known]))
    rank[known] = order / max(1, known.sum() - 1)
    axes.imshow(rank, cmap="RdYlBu_r", vmin=-0.25, vmax=1.25, aspect="auto")
    for place in np.ndindex(values.shape):
        text = question.shown(values[place]) if known[place] else "–"
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7.5)
    best, ties = best_objectives(rows, question)
    for row in ([best] if best is not None else []) + ties:
        line, column = places[row["objective"]]
        width = 2.2 if row is best else 0.9
        frame = Rectangle((column - 0.47, line - 0.47), 0.94, 0.94, fill=False, edgecolor="#111111", linewidth=width)
        axes.add_patch(frame)
    axes.set_xticks(range(len(predicts)), [LABELS[name] for name in predicts])
    axes.set_yticks(range(len(weightings)), weightings)
    axes.set_title(f"{question.title}: {question.words}", fontsize=8)
    axes.grid(False)
    axes.tick_params(length=0)


def _samples_figure(samples: Mapping[str, np.ndarray]) -> Figure:
    """A line of samples for each objective, without guidance and with it."""
    columns = max(map(len, samples.values()))
    figure, axes = picture_lines(samples, 2.2 + 0.42 * columns, 0.6 + 0.42 * len(samples))
    width = axes.get_xlim()[1]
    axes.set_xticks([width / 4, 3 * width / 4], ["without guidance", "guided"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelsize=7.5)
    return figure
