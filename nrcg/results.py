"""Result tables: read and write the CSV files, choose the best scale of each method, print the comparison."""

from __future__ import annotations

import csv
import io
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nrcg import paper
from nrcg.config import format_scale
from nrcg.errors import DataError
from nrcg.files import atomic_write
from nrcg.intervals import supported

Row = dict[str, str | float]

TEXT_COLUMNS = ("experiment", "method", "protocols", "reference", "best_by", "mlflow_run_id", "settings")
"""Columns that stay text; every other column holds numbers."""

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

IDENTITY_COLUMNS = ("experiment", "protocols", "reference", "best_by")
"""Columns in which rows must agree to be compared."""

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

BEST_BY = {
    "cfid": "the lowest class-conditional Fréchet distance",
    "fid": "the lowest Fréchet distance to all training images",
    "ckid": "the lowest class-conditional kernel distance",
    "kid": "the lowest kernel distance to all training images",
    "accuracy_judge": "the highest accuracy by the judge",
}
"""Rules for the best scale of a method, `evaluation.best_by`."""

MAX_WIDTH = 110


def method_label(method: str) -> str:
    """A method's name to print; a method of one's own keeps its name."""
    return METHOD_LABELS.get(method, method)


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Distinct methods in the order of METHOD_LABELS, others after them in the order given."""
    known = list(METHOD_LABELS)
    distinct = list(dict.fromkeys(methods))
    return sorted(distinct, key=lambda method: known.index(method) if method in known else len(known))


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
        raise DataError(f"{path}: no such file; {_remedy(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_remedy(path)}") from None
    return _parse_csv(text, path, columns)


def _remedy(path: str | os.PathLike) -> str:
    return f"make it anew: snakemake --cores all --force {Path(path).as_posix()}"


def _parse_csv(text: str, path: str | os.PathLike, columns: Sequence[str]) -> list[Row]:
    """Rows of a table's text; `path` is for messages."""
    remedy = _remedy(path)
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header = next(reader, [])
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    missing = [name for name in columns if name not in header]
    if header and missing:
        raise DataError(f"{path}: lacks the column {', '.join(missing)}; {remedy}")
    if not lines:
        raise DataError(f"{path}: empty; {remedy}")
    if not text.endswith("\n"):  # a number may have lost its last digits
        raise DataError(f"{path}: cut off within its last line; {remedy}")
    rows: list[Row] = []
    for number, line in lines:
        if len(line) != len(header):
            raise DataError(f"{path}: line {number} has {len(line)} of {len(header)} fields; {remedy}")
        row: Row = {}
        for name, text in zip(header, line, strict=True):
            try:
                row[name] = text if name in TEXT_COLUMNS else float(text or "nan")
            except ValueError:
                raise DataError(f"{path}: line {number}: {name} is no number: {text!r}; {remedy}") from None
        rows.append(row)
    return rows


def read_forward(path: str | os.PathLike) -> list[Row]:
    """Read a forward.csv: one row per method and t = 1..T. Raises DataError, also where a method lacks a step."""
    rows = read_csv(path, FORWARD_COLUMNS)
    steps: dict[str, set[float]] = {}
    for row in rows:
        steps.setdefault(str(row["method"]), set()).add(float(row["t"]))
    short = [method for method, own in steps.items() if own != set.union(*steps.values())]
    if short:
        remedy = f"make it anew: snakemake --cores all --force {Path(path).as_posix()}"
        raise DataError(f"{path}: {short[0]} lacks steps that other methods have; {remedy}")
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
        raise DataError(f"{path}: {error}; {_remedy(path)}") from None
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


def extractor(rows: Sequence[Row]) -> str:
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


def best_and_ties(rows: Sequence[Row]) -> tuple[Row | None, list[Row]]:
    """The method, at its best scale, with the lowest class-conditional distance, and those that its 95 % interval
    does not tell from it. (None, []) where none has a finite distance."""
    conditional = frechet_columns(rows)[1]
    finite = [row for row in best_per_method(rows).values() if math.isfinite(row[conditional])]
    if not finite:
        return None, []
    lowest = min(finite, key=lambda row: row[conditional])
    return lowest, [row for row in finite if row is not lowest and not differ(lowest, row, conditional)]


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
        features = ", ".join(f"{name}: {extractor(rows)}" for name, rows in tables.items())
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
        experiment, features=extractor(rows), num_samples=counts.pop() if len(counts) == 1 else None
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
