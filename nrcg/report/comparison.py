"""The published numbers beside ours: value, interval, protocol, sample count, and whether they may be compared."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nrcg.csv_files import Row
from nrcg.layout import format_scale
from nrcg.report import paper
from nrcg.report.best import best_per_method, best_rule
from nrcg.report.columns import method_label, protocol_columns, protocol_of
from nrcg.report.tables import format_count, format_interval, format_number, format_percent

PROTOCOL_WORDS = {
    "inception": "clean-fid's Inception",
    "torcheval": "torcheval's Inception",
    "judge": "features of our judge",
}


@dataclass(frozen=True)
class ComparedNumber:
    """One published number and ours, as text.

    Attributes:
        setup, scale: of the method; ours / published.
        quantity: accuracy, FID or cFID, with our column's name.
        published, ours, interval: values; "-" for what was not measured.
        protocol: ours.
        samples: ours / published.
        reasons: why the values may not be compared; empty where they may.
    """

    setup: str
    scale: str
    quantity: str
    published: str
    ours: str
    interval: str
    protocol: str
    samples: str
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether the two values may be compared, and why not."""
        if self.ours == "-":
            return "no: not measured"
        return f"no: {'; '.join(self.reasons)}" if self.reasons else "yes"


def compare(
    experiment: str,
    rows: Sequence[Row],
    *,
    image_size: int | None = None,
    num_steps: int | None = None,
    start: str | None = None,
    source: str | None = None,
) -> list[ComparedNumber]:
    """Every published number of an experiment beside ours, each method at its best scale; empty for an own experiment.

    Args:
        rows: of metrics.csv.
        image_size, num_steps, start, source: see `paper.differences`.
    """
    published = paper.published_rows(experiment)
    if not published or not rows:
        return []
    setting = {"image_size": image_size, "num_steps": num_steps, "start": start, "source": source}
    best, expected = best_per_method(rows), paper.PROTOCOLS[published[0].dataset].num_samples
    found = []
    for theirs in published:
        ours = best.get(theirs.method)
        scale = format_scale(ours["scale"]) if ours else "-"
        shared = {
            "setup": method_label(theirs.method),
            "scale": "" if theirs.method == "unconditional" else f"{scale} / {format_scale(theirs.scale)}",
            "samples": f"{format_count(ours['num_samples'] if ours else math.nan)} / {format_count(expected)}",
        }
        for column, words, other in (
            ("accuracy_guide", "the guiding classifier", ()),
            ("accuracy_judge", "the judge", ("graded by another classifier than the one that guides",)),
        ):
            found.append(
                ComparedNumber(
                    **shared,
                    quantity=f"accuracy, % ({column})",
                    published=f"{theirs.accuracy:.2f}",
                    ours=format_percent(ours[column]) if ours else "-",
                    interval=format_interval(ours, column, percent=True) if ours else "",
                    protocol=words,
                    reasons=(*other, *paper.differences(experiment, **setting)),
                )
            )
        for everything, conditional in protocol_columns(rows):
            name = protocol_of(everything)
            counts = {column: _count(ours, column) for column in ("num_samples", "num_reference")}
            reasons = paper.differences(experiment, features=name, **counts, **setting)
            for column, value, words in ((everything, theirs.fid, "FID"), (conditional, theirs.cfid, "cFID")):
                found.append(
                    ComparedNumber(
                        **shared,
                        quantity=f"{words} ({column})",
                        published=f"{value:.2f}",
                        ours=format_number(ours[column]) if ours else "-",
                        interval=format_interval(ours, column) if ours else "",
                        protocol=PROTOCOL_WORDS.get(name, f"features of {name}"),
                        reasons=tuple(reasons),
                    )
                )
    return found


def _count(row: Row | None, column: str) -> int | None:
    value = row.get(column, math.nan) if row else math.nan
    return int(value) if math.isfinite(value) else None


TITLES = ("setup", "scale", "quantity", "published", "ours", "95 % interval", "our protocol", "samples", "comparable")


def cells(line: ComparedNumber) -> list[str]:
    """A line of the table, in the order of TITLES."""
    return [
        *(line.setup, line.scale, line.quantity, line.published, line.ours),
        *(line.interval, line.protocol, line.samples, line.verdict),
    ]


def markdown(experiment: str, rows: Sequence[Row], lines: Sequence[ComparedNumber]) -> str:
    """paper_comparison.md."""
    text = [f"# {experiment}: published and measured", ""]
    if not lines:
        return "\n".join([*text, f"The paper ({paper.TITLE}, arXiv {paper.ARXIV}) has no numbers for it.", ""])
    dataset = paper.COMPARED_WITH[experiment]
    source = ", ".join(dict.fromkeys(row.source for row in paper.published_rows(experiment)))
    text += [
        f"Published: {paper.TITLE}, arXiv {paper.ARXIV}, {source} ({dataset}). Ours / published in scale and samples; "
        f"ours at the {best_rule(rows)[1].split(': ')[0]} ({best_rule(rows)[0]}).",
        "",
        f"| {' | '.join(TITLES)} |",
        f"|{'---|' * len(TITLES)}",
        *(f"| {' | '.join(_markdown(cell) for cell in cells(line))} |" for line in lines),
        "",
    ]
    for column, words in (("protocols", "Protocols"), ("reference", "Compared with")):
        if rows[0].get(column):
            text += [f"{words}: {_markdown(str(rows[0][column]))}", ""]
    return "\n".join(text)


def _markdown(text: str) -> str:
    """Text that Markdown takes neither for HTML nor for a table's edge."""
    return html.escape(text, quote=False).replace("|", "&#124;")
