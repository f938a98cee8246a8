"""Search for the guidance scale of a method: a coarse grid, then golden sections, both on the logarithm of the scale.

The next scale follows from what has been measured so far alone, so a search that was killed goes on where it was, from
its journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from nrcg.csv_files import Row, read_csv, write_csv
from nrcg.errors import ConfigError, DataError
from nrcg.layout import format_scale
from nrcg.report.best import best_rule, differ

GRID = 5
"""Scales of the coarse grid, its ends included."""
GOLDEN = (3 - math.sqrt(5)) / 2
"""0.382: where a new point cuts the larger segment beside the best (Kiefer 1953)."""
TOLERANCE = 1.05
"""The search ends when the best scale's neighbours are within this factor of it."""
AROUND = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Scales to propose, in units of the best."""
DEFAULT_RANGE = (0.1, 1000.0)


def scale_range(scales: Sequence[float]) -> tuple[float, float]:
    """A tenth of the lowest to ten times the highest of a sweep's positive scales; 0.1 to 1000 without any."""
    positive = [scale for scale in scales if scale > 0]
    return (min(positive) / 10, max(positive) * 10) if positive else DEFAULT_RANGE


def check_range(low: float, high: float) -> None:
    """Raises ConfigError unless 0 < low < high."""
    if not 0 < low < high < math.inf:
        raise ConfigError(f"--low, --high: {low:g} to {high:g} is no range; 0 < low < high is needed")


def next_scale(measured: Mapping[float, float], low: float, high: float) -> float | None:
    """The scale to measure next, or None when the best one is bracketed within TOLERANCE.

    First the coarse grid, its ends, its middle, then the rest, so that a small budget still spans the range. Then
    golden sections: of the two segments between the best scale and its neighbours the larger one on a log scale is cut,
    0.382 of the way from the best. The evaluations of a unimodal function are those of Kiefer's search.

    Args:
        measured: scale to value, the lower the better; nan counts as the worst. Scales outside low..high do not count.
        low, high: 0 < low < high.
    """
    ends = math.log(low), math.log(high)
    grid = [_round(math.exp(ends[0] + (ends[1] - ends[0]) * step / (GRID - 1))) for step in range(GRID)]
    grid[0], grid[-1] = low, high
    for step in (0, GRID - 1, GRID // 2, *range(GRID)):
        if grid[step] not in measured:
            return grid[step]
    inside = sorted(scale for scale in measured if low <= scale <= high)
    place = min(range(len(inside)), key=lambda i: worth(measured[inside[i]]))
    best = inside[place]
    beside = [inside[i] for i in (place - 1, place + 1) if 0 <= i < len(inside)]
    # The larger segment; of equal ones that of the better neighbour.
    other = max(beside, key=lambda scale: (round(abs(math.log(scale / best)), 3), -worth(measured[scale])))
    if max(other / best, best / other) < TOLERANCE:
        return None
    proposed = _round(best * (other / best) ** GOLDEN)
    return None if proposed in measured else proposed


def _round(scale: float) -> float:
    """Four significant digits: a scale to be written down."""
    return float(f"{scale:.4g}")


def worth(value: float) -> float:
    """A value to be minimised; nan counts as the worst."""
    return math.inf if math.isnan(value) else value


def search(
    measure: Callable[[float], Row],
    *,
    low: float,
    high: float,
    budget: int,
    best_by: str,
    journal: str | Path,
    settings: str,
    on_row: Callable[[Row, int], object] = lambda row, number: None,
) -> list[Row]:
    """Measure at most `budget` scales, those in the journal included.

    Args:
        measure: scale to a row of metrics, as `nrcg.evaluation.evaluate.evaluate_images` gives it.
        low, high: range of the scales, 0 < low < high.
        budget: evaluations in all.
        best_by: rule of `nrcg.report.best.BEST_BY` that chooses the best.
        journal: CSV; every measured row is added at once. Rows of other settings, or out of
            the range, are kept and not used.
        settings: fingerprint of everything but the scale that decides a row.
        on_row: called with each row, also those read from the journal, and its number from 0.

    Returns:
        The rows in the order of measurement.

    Raises:
        ConfigError: no such range.
        DataError: the journal is damaged.
    """
    check_range(low, high)
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    kept = read_journal(journal)
    rows = [row for row in kept if row["settings"] == settings and low <= row["scale"] <= high][:budget]
    for number, row in enumerate(rows):
        on_row(row, number)
    while len(rows) < budget:
        measured = {row["scale"]: objective_of(row, best_by) for row in rows}
        scale = next_scale(measured, low, high)
        if scale is None:
            break
        row = {"settings": settings, "scale": scale, **measure(scale)}
        rows.append(row)
        kept.append(row)
        write_csv(journal, kept, list(dict.fromkeys(column for one in kept for column in one)))
        on_row(row, len(rows) - 1)
    return rows


def read_journal(path: str | Path) -> list[Row]:
    """Rows of a search, none where there is no file. Raises DataError: damaged."""
    if not Path(path).exists():
        return []
    try:
        return read_csv(path, ("settings", "scale"))
    except DataError as error:
        raise DataError(f"{str(error).partition(';')[0]}; delete it to begin the search anew") from None


def _rule(row: Row, best_by: str) -> tuple[str, int]:
    """The column that is best at the best scale, and its sign, by which the lower is the better."""
    column = best_rule([row | {"best_by": best_by}])[0]
    return column, -1 if column.startswith("accuracy") else 1


def objective_of(row: Row, best_by: str) -> float:
    """The rule's value, the lower the better."""
    column, sign = _rule(row, best_by)
    return sign * row[column]


def best_row(rows: Sequence[Row], best_by: str) -> Row:
    """The best by the rule, nan last, then the lowest scale. Raises DataError where no value is finite."""
    best = min(rows, key=lambda row: (worth(objective_of(row, best_by)), row["scale"]))
    if not math.isfinite(objective_of(best, best_by)):
        raise DataError(f"{_rule(best, best_by)[0]} is finite at none of the scales tried")
    return best


def notes(rows: Sequence[Row], best_by: str, low: float, high: float) -> list[str]:
    """What to know before the best scale is believed: the edge of the range, overlapping intervals, an open bracket."""
    best, column = best_row(rows, best_by), _rule(rows[0], best_by)[0]
    ordered = sorted(rows, key=lambda row: row["scale"])
    place, found = ordered.index(best), []
    # As far as it has been searched: with a small budget the grid may not have reached the ends.
    if best in (ordered[0], ordered[-1]):
        side, flag = ("lowest", "--low") if best is ordered[0] else ("highest", "--high")
        found.append(
            f"{format_scale(best['scale'])} is the {side} scale tried; a better one may lie outside, see {flag}"
        )
    alike = [format_scale(row["scale"]) for row in ordered if row is not best and not differ(best, row, column)]
    if alike:
        told = f"do not tell {', '.join(alike)} from the best"
        found.append(f"the 95 % intervals of {column} {told}; more --num-samples would")
    if next_scale({row["scale"]: objective_of(row, best_by) for row in rows}, low, high) is not None:
        beside = ordered[max(place - 1, 0) : place + 2]
        between = f"{format_scale(beside[0]['scale'])} and {format_scale(beside[-1]['scale'])}"
        found.append(f"the budget ended with the best between {between}")
    return found


def table(rows: Sequence[Row], best_by: str) -> list[tuple[str, ...]]:
    """Cells by scale, the best one marked, with a header."""
    from nrcg.report.tables import format_interval, format_number

    best, column = best_row(rows, best_by), _rule(rows[0], best_by)[0]
    further = [name for name in ("accuracy_judge", "precision", "recall") if name in rows[0] and name != column]
    cells = [("scale", column, "95 % interval", *further, "")]
    for row in sorted(rows, key=lambda row: row["scale"]):
        numbers = [format_number(row[name], 3) for name in further]
        value = format_number(row[column]), format_interval(row, column)
        cells.append((format_scale(row["scale"]), *value, *numbers, "best" if row is best else ""))
    return cells


def yaml_block(experiment: str, method: str, best: float) -> str:
    """The experiment's sweep with scales around the best, as a piece of config.yaml."""
    scales = sorted({float(f"{best * factor:.2g}") for factor in AROUND if factor != 1} | {_round(best)})
    block = {"experiments": {experiment: {"sweep": {method: scales}}}}
    text = yaml.safe_dump(block, default_flow_style=None, sort_keys=False, width=1000)
    return f"# For config.yaml; into a sweep that is there, only the last line.\n{text}"
