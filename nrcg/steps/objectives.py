"""The comparison of a grid of training objectives: table, figures. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nrcg.csv_files import Row, write_csv
from nrcg.errors import DataError
from nrcg.files import load_arrays, read_record
from nrcg.report.columns import check_comparable
from nrcg.report.objectives import save_objective_figures


def compare_objectives(records: Sequence[Path], *, out: Path) -> list[Row]:
    """Write objectives.csv, a row for each objective, and the figures.

    Args:
        records: What `measure_objective` wrote for each; the samples stand beside it.
        out: Folder to write to.

    Returns:
        The rows.

    Raises:
        DataError: A record is damaged, or they cannot be compared.
    """
    rows, samples, measured = [], {}, []
    for path in records:
        try:
            record = read_record(path)
            row = record["row"]
            measured.append(record["scales"][0])
            arrays = load_arrays(path.with_suffix(".npz"))
            samples[row["objective"]] = np.concatenate([arrays["unconditional"], arrays["guided"]])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"damaged ({error})", path) from None
        rows.append(row | {"mlflow_run_id": record.get("mlflow_run_id", "")})
    check_comparable(measured, [str(path) for path in records])
    write_csv(out / "objectives.csv", rows, list(rows[0]))
    save_objective_figures(rows, samples, out)
    return rows
