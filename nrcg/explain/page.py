"""Explanations as one HTML file that loads nothing from elsewhere, and difference maps."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

import numpy as np

from nrcg.data.pictures import png_bytes
from nrcg.explain.explanations import Explanations

MOST_IMAGES = 1000
"""Explanations on a page; a browser gets slow with more."""
SHOWN_PIXELS = 112
"""Width of a picture on the page."""


def difference_map(original: np.ndarray, image: np.ndarray) -> np.ndarray:
    """What has changed, (H, W, 3) uint8: white where nothing has, red where it got brighter, blue where darker.

    The mean over the channels; full colour at the image's own largest change, which the table states.

    Args:
        original, image: (H, W, C) uint8.
    """
    change = (image.astype(np.float64) - original).mean(axis=2)
    share = change / max(np.abs(change).max(), 1.0)
    # White loses the two other colours.
    colours = np.stack([1.0 - np.clip(-share, 0, 1), 1.0 - np.abs(share), 1.0 - np.clip(share, 0, 1)], axis=2)
    return np.round(colours * 255).astype(np.uint8)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } p, dl { max-width: 60rem } dl { display: grid; grid-template-columns: max-content 1fr;
gap: .1rem 1rem } dd { margin: 0 }
table { border-collapse: collapse; width: 100% } th, td { padding: .35rem .6rem; text-align: right;
border-bottom: 1px solid #d8dee4; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: #fff }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid #0969da }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
td.text, th.text { text-align: left } img { image-rendering: pixelated; display: block; border: 1px solid #d8dee4 }
tr.failed td { background: #fff8f0 }
"""
_SCRIPT = """
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, body = document.querySelector("tbody");
  const column = [...head.parentElement.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.children[column].dataset.key;
  const compare = (a, b) => {
    const x = key(a), y = key(b), n = Number(x), m = Number(y);
    const order = x === "" || y === "" || isNaN(n) || isNaN(m) ? x.localeCompare(y) : n - m;
    return up ? order : -order;
  };
  [...body.rows].sort(compare).forEach((row) => body.append(row));
}));
"""
TEXTS = ("image", "from", "target", "found", "status")
"""Columns of text; the others hold pictures or numbers."""


def explanations_page(
    explanations: Explanations,
    rows: Sequence[Mapping[str, object]],
    *,
    title: str,
    facts: Mapping[str, object],
    seeds: Sequence[Explanations] = (),
) -> str:
    """The page: a line for each explanation, sorted by a click on a column's head.

    Args:
        explanations: Whose pictures are shown.
        rows: A mapping of column to text or number for each explanation, all with the same columns.
        title: Of the page.
        facts: What made them and how they did, shown above the table.
        seeds: The same images' by other seeds, whose pictures stand beside.

    Returns:
        HTML. Everything that is put into it is escaped.
    """
    shown = min(len(explanations), MOST_IMAGES)
    pictures = ["original", *(["start"] if explanations.kind == "affirmative" else []), "explanation", "difference"]
    pictures += [f"seed {number}" for number in range(1, len(seeds) + 1)]
    columns = list(rows[0])
    heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in pictures) + "".join(
        f'<th scope="col"{_class(name)}><button type="button">{escaped(name.replace("_", " "))}</button></th>'
        for name in columns
    )
    lines = []
    for place in range(shown):
        cells = "".join(_picture(explanations, seeds, place, name) for name in pictures)
        cells += "".join(
            f'<td{_class(name)} data-key="{escaped(_key(rows[place][name]))}">{escaped(_shown(rows[place][name]))}</td>'
            for name in columns
        )
        lines.append(f"<tr{'' if explanations.succeeded[place] else ' class=failed'}>{cells}</tr>")
    described = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(_shown(value))}</dd>" for name, value in facts.items())
    left = f"<p>The first {shown} of {len(explanations)}.</p>" if shown < len(explanations) else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body><h1>{escaped(title)}</h1>"
        f"<dl>{described}</dl>{left}<p>Difference: red is brighter, blue darker, white unchanged; full colour at the"
        " image's own largest change. A click on a column's head sorts.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + f"\n</tbody></table>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def escaped(value: object) -> str:
    """A value as text that no browser takes for markup, in an attribute neither."""
    return html.escape(str(value), quote=True)


def _class(column: str) -> str:
    return ' class="text"' if column in TEXTS else ""


def _picture(explanations: Explanations, seeds: Sequence[Explanations], place: int, name: str) -> str:
    original, image = explanations.originals[place], explanations.images[place]
    arrays = {"original": original, "start": explanations.starts[place], "explanation": image}
    arrays |= {f"seed {number}": one.images[place] for number, one in enumerate(seeds, 1)}
    pixels = difference_map(original, image) if name == "difference" else arrays[name]
    data = base64.b64encode(png_bytes(pixels)).decode()
    return f'<td><img width="{SHOWN_PIXELS}" alt="{escaped(name)}" src="data:image/png;base64,{data}"></td>'


def _key(value: object) -> str:
    """What a cell is sorted by."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
