"""CSV files of results: written whole, read with checked columns and numbers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nrcg.errors import DataError
from nrcg.files import atomic_write

Row = dict[str, str | float]
TEXT_COLUMNS = (
    *("experiment", "method", "protocols", "reference", "best_by", "mlflow_run_id", "settings"),
    *("objective", "predicts", "weighting", "density", "pair", "kind", "missing", "setting", "stabilizer", "schedule"),
)
"""Columns that stay text; every other column holds numbers."""


def read_csv(path: str | os.PathLike, columns: Sequence[str] = ()) -> list[Row]:
    """Read a table.

    Args:
        path: CSV file with a header line.
        columns: columns that must be there; more are welcome.

    Returns:
        One dict per line. TEXT_COLUMNS are str, all others float; an empty number is nan.

    Raises:
        DataError: the file is missing, empty, cut off, lacks a column or holds text for a number. One line that
            names the file and the command that makes it anew.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError("no such file", path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", path) from None
    return _parse_csv(text, path, columns)


def _parse_csv(text: str, path: str | os.PathLike, columns: Sequence[str]) -> list[Row]:
    """Rows of a table's text; `path` is for messages."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = next(reader, [])
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise DataError(f"cannot be read ({error})", path) from None
    missing = [name for name in columns if name not in header]
    if header and missing:
        raise DataError(f"lacks the column {', '.join(missing)}", path)
    if not lines:
        raise DataError("empty", path)
    if not text.endswith("\n"):  # a number may have lost its last digits
        raise DataError("cut off within its last line", path)
    rows: list[Row] = []
    for number, line in lines:
        if len(line) != len(header):
            raise DataError(f"line {number} has {len(line)} of {len(header)} fields", path)
        row: Row = {}
        for name, text in zip(header, line, strict=True):
            try:
                row[name] = text if name in TEXT_COLUMNS else float(text or "nan")
            except ValueError:
                raise DataError(f"line {number}: {name} is no number: {text!r}", path) from None
        rows.append(row)
    return rows


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write a table; the file is there whole or not at all.

    Args:
        rows: mappings; a missing key or None becomes an empty field. Numbers are written so that they read back equal.
        columns: the header, in this order.

    Raises:
        ValueError: a row has a key that is no column.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _field(value) for name, value in row.items()} for row in rows)
    atomic_write(path, text.getvalue().encode())


def _field(value: object) -> object:
    """Whole numbers without a point: 128, not 128.0."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
