"""What `nrcg explain` leaves: a picture of each explanation and of its difference, a table, a record, a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nrcg.config.explaining import OWN_CLASS
from nrcg.csv_files import write_csv
from nrcg.data.pictures import save_png
from nrcg.evaluation.sides import Side
from nrcg.explain.explanations import Explanations, probabilities
from nrcg.explain.metrics import CHANGED_LEVELS
from nrcg.explain.page import difference_map, explanations_page
from nrcg.files import atomic_write_text

SUMMARY = re.compile(
    r"validity|l1$|changed|cout|lpips|s?c?fid|s?c?fd_|identity_|seed_|noise_|bits_per_dim",
)
"""Beginnings of the names of the metrics that are printed and stand on the page."""


def explanation_rows(
    whole: Explanations, names: Sequence[str], judges: Mapping[str, np.ndarray]
) -> list[dict[str, object]]:
    """A line of explanations.csv for each explanation.

    Args:
        names: (N,) what each image is called.
        judges: Name to (N, K) probabilities of the explanations.
    """
    rows = []
    for place in range(len(whole)):
        target, own = whole.targets[place], whole.own[place]
        change = np.abs(whole.images[place].astype(int) - whole.originals[place])
        status = "flipped" if whole.succeeded[place] else "failed"
        if whole.kind in OWN_CLASS and whole.succeeded[place]:
            status = "kept"
        if whole.skipped[place]:
            status = "skipped"
        row: dict[str, object] = {
            "image": names[place],
            "from": whole.name(own),
            "target": whole.name(target),
            "found": whole.name(whole.found[place]),
            "status": status,
            "p_target_before": float(whole.before[place, target]),
            "p_target": float(whole.after[place, target]),
            "p_own_before": float(whole.before[place, own]),
            "p_own": float(whole.after[place, own]),
            "l1": float(change.mean() / 255),
            "changed": float((change.max(axis=2) > CHANGED_LEVELS).mean()),
            "largest_change": float(change.max() / 255),
            "tau": float(whole.tau[place]),
            "weight": float(whole.weight[place]),
            "seconds": float(whole.seconds[place]),
        }
        for name, probability in judges.items():
            row |= {f"p_target_{name}": float(probability[place, target])}
        rows.append(row)
    return rows


def write_explanations(
    out: Path,
    whole: Explanations,
    seeds: Sequence[Explanations],
    images: Side,
    judges: Mapping[str, nn.Module],
    metrics: dict[str, float | str] | None,
    record: dict[str, Any],
    notes: Sequence[str],
) -> None:
    """The pictures, the table, the record and the page.

    Args:
        out: Folder.
        whole: By the first seed.
        seeds: The same images' by others; their pictures end in _seedN.
        images: What was explained.
        judges: By name.
        metrics: Of `evaluate_explanations`, or None.
        record: What explanations.json says beside them.
        notes: Lines.
    """
    names = images.names or [f"{place:05d}" for place in range(len(whole))]
    for number, one in enumerate([whole, *seeds]):
        ending = f"_seed{number}" if number else ""
        for place, (original, image) in enumerate(zip(one.originals, one.images, strict=True)):
            save_png(out / "explanations" / f"{place:05d}{ending}.png", image)
            save_png(out / "differences" / f"{place:05d}{ending}.png", difference_map(original, image))
    rows = explanation_rows(whole, names, {name: probabilities(one, whole.images) for name, one in judges.items()})
    if seeds:
        shares = np.mean([one.succeeded for one in (whole, *seeds)], axis=0)
        rows = [row | {"seed_validity": float(value)} for row, value in zip(rows, shares, strict=True)]
    write_csv(out / "explanations.csv", rows, list(rows[0]))
    plain = {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in (metrics or {}).items()
    }
    text = json.dumps(record | {"metrics": plain, "notes": notes}, indent=1, allow_nan=False, default=str)
    atomic_write_text(out / "explanations.json", text + "\n")
    settings = record["settings"]
    facts = {
        "images": images.path,
        **{key: record[key] for key in ("ddpm", "classifier", "robust", "reference") if record.get(key)},
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        **{f"note {number}": note for number, note in enumerate(notes, 1)},
        **{name: f"{value} ({interval})" for name, value, interval in summary(metrics or {})},
    }
    title = f"{len(whole)} {settings['kind']} explanations"
    page = explanations_page(whole, rows, title=title, facts=facts, seeds=seeds)
    atomic_write_text(out / "explanations.html", page)


def summary(metrics: Mapping[str, float | str]) -> list[tuple[str, str, str]]:
    """The metrics that say most: name, value, 95 % interval."""
    return [
        (name, f"{value:.3f}", f"{metrics[f'{name}_lo']:.3f} to {metrics[f'{name}_hi']:.3f}")
        for name, value in metrics.items()
        if f"{name}_lo" in metrics and SUMMARY.match(name)
    ]
