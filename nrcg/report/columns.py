"""The columns of forward.csv and metrics.csv: read, checked, named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

from nrcg.csv_files import Row, _parse_csv, read_csv
from nrcg.errors import DataError

FORWARD_COLUMNS = (
    "method",
    "t",
    "num_images",
    "accuracy",
    "logit_sensitivity_mean",
    "logit_sensitivity_std",
    "gradient_sensitivity_mean",
    "gradient_sensitivity_std",
)
METRICS_COLUMNS = (
    "experiment",
    "method",
    "scale",
    "num_samples",
    "accuracy_guide",
    "accuracy_judge",
    "precision",
    "recall",
    "nonfinite",
    "images_per_second",
    "peak_memory_mib",
)
"""Beside these a metrics.csv holds the Fréchet distances of one protocol or several, the headline's first: fid and
cfid, fid_torcheval and cfid_torcheval, or fd_NAME and cfd_NAME; more metrics (docs/evaluation.md); and NAME_lo,
NAME_hi, the 95 % interval of each."""
METHOD_LABELS = {
    "unconditional": "unconditional",
    "robust": "robust",
    "robust_x0": "robust + x0",
    "non_robust": "non-robust",
    "non_robust_x0": "non-robust + x0",
    "non_robust_x0_ema90": "non-robust + x0 + EMA 0.9",
    "non_robust_x0_ema99": "non-robust + x0 + EMA 0.99",
    "non_robust_x0_adam": "non-robust + x0 + ADAM",
}
"""Names to print, in the order of every table and legend."""


def method_label(method: str) -> str:
    """A method's name to print; a method of one's own keeps its name."""
    return METHOD_LABELS.get(method, method)


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Distinct methods in the order of METHOD_LABELS, others after them in the order given."""
    known = list(METHOD_LABELS)
    distinct = list(dict.fromkeys(methods))
    return sorted(distinct, key=lambda method: known.index(method) if method in known else len(known))


def read_forward(path: str | os.PathLike) -> list[Row]:
    """Read a forward.csv: one row per method and t = 1..T. Raises DataError, also where a method lacks a step."""
    rows = read_csv(path, FORWARD_COLUMNS)
    steps: dict[str, set[float]] = {}
    for row in rows:
        steps.setdefault(str(row["method"]), set()).add(float(row["t"]))
    short = [method for method, own in steps.items() if own != set.union(*steps.values())]
    if short:
        raise DataError(f"{short[0]} lacks steps that other methods have", path)
    return rows


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """Read a metrics.csv: one row per method and scale, with the Fréchet distances of one extractor.

    Raises:
        DataError: as read_csv; also without Fréchet columns.
    """
    return _checked_metrics(read_csv(path, METRICS_COLUMNS), path)


def parse_metrics(text: str, name: str) -> list[Row]:
    """As `read_metrics`, from the text of a metrics.csv; `name` is for messages."""
    return _checked_metrics(_parse_csv(text, name, METRICS_COLUMNS), name)


def _checked_metrics(rows: list[Row], path: str | os.PathLike) -> list[Row]:
    try:
        frechet_columns(rows)
    except DataError as error:
        raise DataError(f"{error}", path) from None
    return rows


def frechet_columns(rows: Sequence[Row]) -> tuple[str, str]:
    """Names of the headline protocol's Fréchet distances, to all training images and to those of the target class.

    Returns:
        ("fid", "cfid") if there, else ("fid_torcheval", "cfid_torcheval"), else the first such as ("fd_judge",
        "cfd_judge").

    Raises:
        DataError: the rows have no such pair of columns.
    """
    return protocol_columns(rows)[0]


def protocol_columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """`frechet_columns` of every protocol, the headline's first. Raises DataError without any."""
    columns = list(rows[0]) if rows else []
    named = [name for name in columns if name.startswith("fd_") and not name.endswith(("_lo", "_hi"))]
    pairs = [(name, f"c{name}") for name in ("fid", "fid_torcheval", *named)]
    found = [pair for pair in pairs if set(pair) <= set(columns)]
    if not found:
        raise DataError("no Fréchet distance: neither fid and cfid nor fd_NAME and cfd_NAME are among the columns")
    return found


def protocol_of(frechet: str) -> str:
    """The extractor behind a Fréchet column: `inception` for fid, `torcheval` for fid_torcheval, `judge` for
    fd_judge."""
    return "inception" if frechet == "fid" else frechet.removeprefix("fid_").removeprefix("fd_")


def headline_protocol(rows: Sequence[Row]) -> str:
    """The network whose features the headline distances compare: `inception`, `judge`, ... Raises DataError."""
    return protocol_of(frechet_columns(rows)[0])


def check_comparable(rows: Sequence[Row], names: Sequence[str] = ()) -> None:
    """Refuse rows that were not measured alike.

    Args:
        names: of the rows in the message, such as their files; by default methods.

    Raises:
        DataError: protocols, preprocessing, weights, reference images or sample counts differ; says in what.
    """
    names = names or [str(row.get("method", "")) for row in rows]
    for column in ("protocols", "reference", "num_samples", "num_pairwise"):
        values = {}
        for name, row in zip(names, rows, strict=True):
            values.setdefault(row.get(column), name)
        if len(values) > 1:
            (first, first_name), (second, second_name), *_ = values.items()
            what = {"protocols": "features", "reference": "reference images"}.get(column, f"numbers ({column})")
            raise DataError(
                f"{what} differ and cannot be compared: {first_name} has {first!r}, {second_name} has {second!r}; "
                "evaluate every method anew"
            )


def interval(row: Row, column: str) -> tuple[float, float]:
    """The 95 % interval of a metric; (nan, nan) where there is none."""
    return row.get(f"{column}_lo", math.nan), row.get(f"{column}_hi", math.nan)


def has_intervals(rows: Sequence[Row], column: str) -> bool:
    return bool(rows) and f"{column}_lo" in rows[0] and f"{column}_hi" in rows[0]
