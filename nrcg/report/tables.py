"""Results as text: numbers, intervals, and the comparison table of the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from nrcg.csv_files import Row
from nrcg.errors import DataError
from nrcg.layout import format_scale
from nrcg.report import paper
from nrcg.report.best import at_edge, best_and_ties, best_per_method, best_rule
from nrcg.report.columns import frechet_columns, headline_protocol, interval, sort_methods

MAX_WIDTH = 110


def format_number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits and no needless exponent; "-" for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def format_count(value: float) -> str:
    """A whole number with commas; "-" for nan."""
    return "-" if math.isnan(value) else f"{value:,.0f}"


def format_percent(value: float) -> str:
    """A share in [0, 1] as a percentage with one decimal, no sign; "-" for nan."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def format_interval(row: Row, column: str, percent: bool = False) -> str:
    """The 95 % interval of a metric as "lo to hi"; empty where there is none."""
    low, high = interval(row, column)
    if math.isnan(low) or math.isnan(high):
        return ""
    if percent:
        return f"{format_percent(low)} to {format_percent(high)}"
    return f"{format_number(low)} to {format_number(high)}"


def table_cells(row: Row, everything: str, conditional: str) -> list[str]:
    """A setting's numbers as the comparison table shows them; the Fréchet columns by their names."""
    return [
        format_percent(row["accuracy_judge"]),
        format_percent(row["accuracy_guide"]),
        format_number(row[conditional]),
        format_number(row[everything]),
        format_number(row["precision"], 3),
        format_number(row["recall"], 3),
        format_count(row["nonfinite"]),
        format_number(row["images_per_second"], 3),
    ]


def format_table(rows: Sequence[Row]) -> str:
    """The comparison for the terminal: each method at its best scale, at most 110 characters wide.

    Beneath it stand the rule, what lies at the edge of its sweep, and the published rows.

    Raises:
        DataError: no Fréchet columns.
    """
    everything, conditional = frechet_columns(rows)
    best = best_per_method(rows)
    _, ties = best_and_ties(rows)
    header = ["method", "scale", "judge %", "guide %", conditional, everything, "prec.", "recall", "nonfin.", "img/s"]
    body = [
        [
            method,
            format_scale(row["scale"]),
            *table_cells(row, everything, conditional),
        ]
        for method, row in best.items()
    ]
    for line, row in zip(body, best.values(), strict=True):
        line[4] = f"≈{line[4]}" if any(row is tie for tie in ties) else line[4]
    lines = _align([header, *body])
    lines.insert(1, "-" * len(lines[0]))
    column, rule = best_rule(rows)
    lines += ["", *_wrap(f"{rule} ({column}); judge %, guide %: samples classified as the target")]
    for note in filter(None, [tie_note(rows), *edge_notes(rows)]):
        lines += _wrap(note)
    lines += _published_lines(rows)
    return "\n".join(lines)


def tie_note(rows: Sequence[Row]) -> str:
    """A sentence that names the methods whose difference from the best is not supported; empty without any."""
    lowest, ties = best_and_ties(rows)
    if not ties:
        return ""
    names = ", ".join(str(row["method"]) for row in ties)
    return f"≈ the 95 % intervals do not tell {names} from the lowest {frechet_columns(rows)[1]}, {lowest['method']}."


def format_comparison(tables: Mapping[str, Sequence[Row]]) -> str:
    """Several experiments or branches side by side for the terminal: each method at its best scale, by method.

    Args:
        tables: the rows of each metrics.csv by the name to print.

    Raises:
        DataError: no Fréchet columns, or those of different features, which cannot be compared.
    """
    columns = {name: frechet_columns(rows) for name, rows in tables.items()}
    if len(set(columns.values())) > 1:
        features = ", ".join(f"{name}: {headline_protocol(rows)}" for name, rows in tables.items())
        raise DataError(f"features differ and cannot be compared: {features}")
    everything, conditional = next(iter(columns.values()))
    best = {name: best_per_method(rows) for name, rows in tables.items()}
    body = [
        [method, name, format_scale(rows[method]["scale"]), *table_cells(rows[method], everything, conditional)]
        for method in sort_methods(method for rows in best.values() for method in rows)
        for name, rows in best.items()
        if method in rows
    ]
    header = ["method", "from", "scale", "judge %", "guide %", conditional, everything, "prec.", "recall"]
    lines = _align([header, *(line[: len(header)] for line in body)])
    lines.insert(1, "-" * len(lines[0]))
    column, rule = best_rule(next(iter(tables.values())))
    return "\n".join([*lines, "", *_wrap(f"{rule} ({column})")])


def edge_notes(rows: Sequence[Row]) -> list[str]:
    """One sentence for each method whose best scale lies at the edge of its sweep."""
    notes = []
    for method, row in best_per_method(rows).items():
        if at_edge(rows, method):
            scales = [other["scale"] for other in rows if other["method"] == method]
            side = "lowest" if row["scale"] == min(scales) else "highest"
            notes.append(
                f"{method}: {format_scale(row['scale'])} is the {side} scale tried; a better one may lie outside."
            )
    return notes


def _align(table: list[list[str]]) -> list[str]:
    """Columns padded to equal width: the first to the left, numbers to the right. Too long a first is cut."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    spare = MAX_WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(spare, 8))
    lines = []
    for line in table:
        first = line[0] if len(line[0]) <= widths[0] else line[0][: widths[0] - 1] + "…"
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _published_lines(rows: Sequence[Row]) -> list[str]:
    """The published rows, with what makes their values incomparable."""
    experiment = str(rows[0].get("experiment", ""))
    published = paper.published_rows(experiment)
    if not published:
        return []
    counts = {int(row["num_samples"]) for row in rows if math.isfinite(row["num_samples"])}
    changes = paper.differences(
        experiment, features=headline_protocol(rows), num_samples=counts.pop() if len(counts) == 1 else None
    )
    lines = ["", f"published, {published[0].dataset} (guide %, cFID, FID by torcheval's Inception):"]
    lines += _align(
        [
            [row.method, format_scale(row.scale), f"{row.accuracy:.2f} %", f"cFID {row.cfid:.2f}", f"FID {row.fid:.2f}"]
            for row in published
        ]
    )
    if changes:
        lines += _wrap(f"not comparable in value: {'; '.join(changes)}")
    return lines


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, MAX_WIDTH, subsequent_indent="  ")
