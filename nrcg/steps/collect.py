"""The methods' metrics in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nrcg.csv_files import write_csv
from nrcg.errors import DataError
from nrcg.files import write_record
from nrcg.report.best import summarize
from nrcg.report.columns import check_comparable, headline_protocol, read_metrics


def collect(metrics: Sequence[Path], *, out: Path, best_by: str, summary: Path | None = None) -> list[dict]:
    """Join the methods' metrics into metrics.csv, and the best of each into summary.json.

    Args:
        metrics: A table per method.
        out: metrics.csv.
        best_by: What the best scale of a method is best in, written into each row.
        summary: summary.json; None writes none.

    Returns:
        The rows of metrics.csv.

    Raises:
        DataError: A table is damaged, or the tables cannot be compared.
    """
    tables = {str(path): read_metrics(path) for path in metrics}
    protocols = {path: headline_protocol(rows) for path, rows in tables.items()}
    if len(set(protocols.values())) > 1:
        raise DataError(f"features differ and cannot be compared: {protocols}; evaluate every method anew")
    rows = [row | {"best_by": best_by} for own in tables.values() for row in own]
    check_comparable(rows, [path for path, own in tables.items() for _ in own])
    write_csv(out, rows, list(dict.fromkeys(column for row in rows for column in row)))
    if summary is not None:
        write_record(summary, summarize(rows))
    return rows
