"""Sections of the report beside the paper's comparison: likelihood, training objectives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nrcg.csv_files import Row, read_csv
from nrcg.errors import DataError
from nrcg.report.columns import interval
from nrcg.report.explanations import COLUMNS, realism_column
from nrcg.report.objectives import questions, verdicts
from nrcg.report.sections import drawing_uri
from nrcg.report.tables import format_number


@dataclass(frozen=True)
class Study:
    """A section of the report.

    Attributes:
        name: Its anchor.
        title: Its heading.
        paragraphs: Text.
        figures: (address, caption) of pictures.
        columns: Titles of a table; none: there is no table.
        lines: Its lines; each cell a text and its interval, "" where there is none.
    """

    name: str
    title: str
    paragraphs: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    lines: Sequence[Sequence[tuple[str, str]]] = field(default=())


def likelihood_study(folder: Path) -> Study:
    """Bits per dimension: likelihood.json in words, and the figure."""
    try:
        record = json.loads((folder / "likelihood.json").read_text(encoding="utf-8"))
        value, error = record["bits_per_dim"]
        count, steps = record["num_images"], record["num_steps"]
        flow = record.get("flow_bits_per_dim")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"no record of a likelihood ({problem})", folder / "likelihood.json") from None
    terms = "every term" if steps is None else f"{steps} stratified terms of each image"
    text = (
        f"The variational bound of {count:,} validation images is {value:.3f} ± {error:.3f} bits per dimension (mean "
        f"and standard error over the images; {terms} between t = 2 and T, the first and the last exactly)."
    )
    if flow is not None:
        text += f" By the probability-flow ODE it is {flow[0]:.3f} ± {flow[1]:.3f}."
    picture = (
        figure_address(folder, "bits_per_dim"),
        "Each term of the bound, and the network's mean squared errors, over t.",
    )
    return Study("likelihood", "Likelihood", [text], [picture])


def objectives_study(folder: Path) -> Study:
    """The grid of objectives: verdicts, table, figures."""
    rows = read_csv(folder / "objectives.csv", ("objective", "predicts", "weighting", "bits_per_dim", "scale"))
    asked = questions(rows)
    lines = [
        [
            (str(row["objective"]), ""),
            *((question.shown(row[question.column]), interval_text(row, question.column)) for question in asked),
            (format_number(row["scale"], 3), ""),
        ]
        for row in rows
    ]
    pictures = [
        (
            figure_address(folder, "objectives"),
            "Coloured by rank, blue is better. A thick frame marks the best, thin ones those that the 95 % intervals "
            "do not tell from it.",
        ),
        (
            figure_address(folder, "samples"),
            "The first samples of each: equal seeds, without guidance and at its best scale.",
        ),
    ]
    text = (
        f"{len(rows)} diffusion models, trained on the same images for as many steps, differ in what the U-Net "
        "predicts and in the weight of its squared error over t. Guided by the same classifier; the scale is that of "
        "the lowest class-conditional distance."
    )
    titles = ["objective", *(question.words for question in asked), "scale"]
    return Study("objectives", "Training objectives", [text, *verdicts(rows)], pictures, titles, lines)


def explanations_study(folder: Path) -> Study:
    """Explanations: table, validity and realism against closeness, pictures."""
    rows = read_csv(folder / "explanations.csv", COLUMNS)
    realism = realism_column(rows)
    shown = {
        "validity": "validity, guide",
        "validity_judge": "validity, judge",
        "validity_robust": "validity, robust",
        "l1": "L1",
        "changed": "pixels changed",
        "cout": "COUT",
        "seed_validity": "seeds that succeed",
        "noise_ratio": "noise ratio",
        **({realism: realism, f"s{realism[1:]}": f"s{realism[1:]}"} if realism else {}),
        "bits_per_dim": "bits per dimension",
        "seconds": "seconds each",
    }
    known = [name for name in shown if any(math.isfinite(row.get(name, math.nan)) for row in rows)]
    lines = [
        [
            (f"{row['method']}, {row['pair']}", ""),
            *((format_number(row.get(name, math.nan), 3), interval_text(row, name)) for name in known),
        ]
        for row in rows
    ]
    count = sum(int(row["num_images"] - row["num_skipped"]) for row in rows if row["method"] == rows[0]["method"])
    text = (
        f"What would have to change in an image for another answer? {count} validation images, explained by each way "
        "and judged by the classifier that guided and by those that never did. An explanation should flip both, stay "
        "near its image and look real; an adversarial example flips the guide alone."
    )
    pictures = [
        (figure_address(folder, "explanations"), "Validity and realism against closeness, with 95 % intervals."),
        (figure_address(folder, "pictures"), "The first images, and what each way makes of them; none picked by hand."),
    ]
    titles = ["way, classes", *(shown[name] for name in known)]
    return Study("explanations", "Explanations", [text], pictures, titles, lines)


def interval_text(row: Row, column: str) -> str:
    """The 95 % interval of a value as text, "" where there is none."""
    low, high = interval(row, column)
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    percent = column.startswith("accuracy")
    return " – ".join(format_number(100 * end if percent else end, 3) for end in (low, high))


def figure_address(folder: Path, name: str) -> str:
    """The address of a figure. Raises DataError where there is none."""
    uri = drawing_uri(folder, name)
    if uri is None:
        raise DataError("no such figure", folder / f"{name}.png")
    return uri


STUDIES: Mapping[str, tuple[str, Callable[[Path], Study]]] = {
    "likelihood": ("likelihood", likelihood_study),
    "objectives": ("objectives", objectives_study),
    "explain": ("explanations", explanations_study),
}
"""Section of an experiment that asks for it -> folder beside the report, and what makes the report's section of it."""
