"""Every way to explain in one table, with figures. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nrcg.csv_files import Row, read_csv, write_csv
from nrcg.files import load_arrays
from nrcg.report.explanations import COLUMNS, save_explanation_figures


def compare_explanations(tables: Sequence[Path], *, out: Path) -> list[Row]:
    """Write explanations.csv, a row for each way and pair, and the figures.

    Args:
        tables: What `measure_explanations` wrote for each way; its first images stand beside it.
        out: Folder to write to.

    Returns:
        The rows.

    Raises:
        DataError: A file is damaged.
    """
    rows: list[Row] = []
    pictures = {}
    for path in tables:
        own = read_csv(path, COLUMNS)
        pictures[path.stem] = load_arrays(path.with_suffix(".npz"))
        rows += own
    write_csv(out / "explanations.csv", rows, list(dict.fromkeys(column for row in rows for column in row)))
    save_explanation_figures(rows, pictures, out)
    return rows
