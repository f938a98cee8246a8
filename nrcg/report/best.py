"""The best scale of each method, what cannot be told from it, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nrcg.csv_files import Row
from nrcg.errors import DataError
from nrcg.evaluation.intervals import supported
from nrcg.report.columns import frechet_columns, has_intervals, interval, sort_methods

BEST_BY = {
    "cfid": "the lowest class-conditional Fréchet distance",
    "fid": "the lowest Fréchet distance to all training images",
    "ckid": "the lowest class-conditional kernel distance",
    "kid": "the lowest kernel distance to all training images",
    "accuracy_judge": "the highest accuracy by the judge",
}
"""Rules for the best scale of a method, `evaluation.best_by`."""


def differ(a: Row, b: Row, column: str) -> bool:
    """Whether the 95 % intervals of two settings support that they differ in a metric; True where there are none."""
    if not has_intervals([a, b], column):
        return True
    return supported(a[column], interval(a, column), b[column], interval(b, column))


def best_rule(rows: Sequence[Row]) -> tuple[str, str]:
    """The column that the best scale of a method is best in, and the rule in words. Raises DataError."""
    rule = str(rows[0].get("best_by") or "cfid") if rows else "cfid"
    everything, conditional = frechet_columns(rows)
    if rule not in BEST_BY:
        raise DataError(f"best_by: {rule!r} is no rule; allowed: {', '.join(BEST_BY)}")
    column = {"cfid": conditional, "fid": everything}.get(rule, rule)
    if rule in ("ckid", "kid"):
        frechet = conditional if rule == "ckid" else everything
        column = frechet.replace("fid", "kid", 1) if "fid" in frechet[:4] else frechet.replace("fd_", "kd_", 1)
    if column not in rows[0]:
        raise DataError(f"best_by: {rule}: there is no column {column}")
    return column, f"best scale of a method: {BEST_BY[rule]}"


def best_per_method(rows: Sequence[Row]) -> dict[str, Row]:
    """The row of each method's best scale by the rows' `best_by` (cfid without one), nan last, then lowest scale.

    The number is the one that is reported as well, as in the paper: a little optimistic for long sweeps.

    Raises:
        DataError: no Fréchet columns, or not that of the rule.
    """
    column = best_rule(rows)[0]
    sign = -1 if column.startswith("accuracy") else 1

    def rank(row: Row) -> tuple[bool, float, float]:
        value = row[column]
        return math.isnan(value), 0.0 if math.isnan(value) else sign * value, row["scale"]

    return {
        method: min((row for row in rows if row["method"] == method), key=rank)
        for method in sort_methods(row["method"] for row in rows)
    }


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Settings that no other beats in judge accuracy and class-conditional distance at once, by rising accuracy.

    A setting is left out if another is at least as good in both and better in one; so are those without a finite value.
    """
    conditional = frechet_columns(rows)[1]
    finite = [row for row in rows if math.isfinite(row["accuracy_judge"]) and math.isfinite(row[conditional])]
    front: list[Row] = []
    for row in sorted(finite, key=lambda row: (-row["accuracy_judge"], row[conditional])):
        if not front or row[conditional] < front[-1][conditional]:
            front.append(row)
    return front[::-1]


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Each method's numbers at its best scale, for summary.json; a number that is not finite becomes None."""
    return {
        method: {
            name: (value if math.isfinite(value) else None) for name, value in row.items() if isinstance(value, float)
        }
        for method, row in best_per_method(rows).items()
    }


def at_edge(rows: Sequence[Row], method: str) -> bool:
    """Whether the best scale is the lowest or highest of several tried, so that a better one may lie outside.

    A scale without a finite value counts as tried. False where no scale has one.

    Raises:
        KeyError: no row of this method.
        DataError: no Fréchet columns.
    """
    best = best_per_method(rows)[method]
    scales = {row["scale"] for row in rows if row["method"] == method}
    if len(scales) < 2 or math.isnan(best[best_rule(rows)[0]]):
        return False
    return best["scale"] in (min(scales), max(scales))


def best_and_ties(rows: Sequence[Row]) -> tuple[Row | None, list[Row]]:
    """The method, at its best scale, with the lowest class-conditional distance, and those that its 95 % interval
    does not tell from it. (None, []) where none has a finite distance."""
    conditional = frechet_columns(rows)[1]
    finite = [row for row in best_per_method(rows).values() if math.isfinite(row[conditional])]
    if not finite:
        return None, []
    lowest = min(finite, key=lambda row: row[conditional])
    return lowest, [row for row in finite if row is not lowest and not differ(lowest, row, conditional)]
