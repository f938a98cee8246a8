"""The distributions whose density is known, in one table, with figures and a page. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nrcg.csv_files import Row, read_csv, write_csv
from nrcg.files import load_arrays
from nrcg.report.densities import COLUMNS, density_study, save_density_figures
from nrcg.report.page import write_study_page


def compare_densities(tables: Sequence[Path], *, out: Path) -> list[Row]:
    """Write densities.csv, the figures and report.html.

    Args:
        tables: What `measure_density` wrote for each distribution; the points stand beside it.
        out: Folder to write to.

    Returns:
        The rows.

    Raises:
        DataError: A file is damaged.
    """
    rows, points = [], {}
    for path in tables:
        own = read_csv(path, COLUMNS)
        points[str(own[0]["density"])] = load_arrays(path.with_suffix(".npz"))
        rows += own
    write_csv(out / "densities.csv", rows, list(rows[0]))
    save_density_figures(rows, points, out)
    write_study_page(out / "report.html", "Known densities", [density_study(rows, out)])
    return rows
