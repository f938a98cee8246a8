"""What the sections of the report show: facts, sums, tables, pictures, the models' records."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from nrcg.config import ROLES, scaled_beta
from nrcg.csv_files import Row, read_csv
from nrcg.data.pictures import load_samples, png_bytes, sample_grid
from nrcg.errors import DataError
from nrcg.layout import format_scale
from nrcg.report import paper
from nrcg.report.best import at_edge, best_and_ties, best_per_method
from nrcg.report.columns import frechet_columns, method_label, sort_methods
from nrcg.report.drawing import render
from nrcg.report.figures import classifier_accuracy, training_loss
from nrcg.report.tables import format_count, format_interval, format_number, format_percent, table_cells

STRIP_COLUMNS = 16
"""Samples per method in the row of equal seeds."""
GALLERY = 256
"""Samples of the best setup, as many as the paper's fig. 9 shows."""


class ReportContext(TypedDict, total=False):
    """What the report is told about an experiment; experiment, target and classes are needed.

    Attributes:
        target: name of the class to generate, one of classes.
        T: number of diffusion steps.
        num_samples: samples per method and scale.
        start: where sampling starts, `standard_normal` or `data_mean`.
        dataset: name of the data set.
        source: where its images come from, `dataset.source`.
        target_share: share of the target among the training images, in [0, 1].
        commit: git commit of the code.
        versions: package -> version.
        settings: the experiment's configuration, nested.
    """

    experiment: str
    description: str
    target: str
    classes: Sequence[str]
    T: int
    num_samples: int
    start: str
    dataset: str
    source: str
    target_share: float
    commit: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]


CAPTIONS = {
    "forward_accuracy": (
        "fig. 1",
        "Accuracy of the classifiers on validation images noised to step t. The non-robust one never saw noise.",
    ),
    "logit_sensitivity": (
        "fig. 2",
        "Change of the logits from one step to the next, per change of the image (eq. 3): mean and one standard "
        "deviation over images, mirrored downwards on the log axis.",
    ),
    "gradient_sensitivity": ("fig. 3", "The same for the guidance gradient (eqs. 4 and 6)."),
    "stabilizers": ("fig. 4", "Gradient sensitivity with the stabilizers, EMA (eq. 7) and ADAM (eq. 8)."),
    "accuracy_vs_scale": (
        "figs. 5 and 8a",
        "Share of samples in the target class. The judge never guides; the guiding classifier grades its own work.",
    ),
    "fid_vs_scale": (
        "figs. 6 and 8b",
        "Distance to all training images. It grows when only one class is made, also if the samples are perfect.",
    ),
    "cfid_vs_scale": ("figs. 7 and 8c", "Distance to the training images of the target class alone."),
    "pareto": (
        "",
        "Judge accuracy against the class-conditional distance of every setting, with 95 % intervals. A setting on the "
        "front is beaten by no other in both.",
    ),
}
"""File -> the paper's figure (empty for ours alone), caption. best_samples is shown as the rows of samples."""
COLUMN_TITLES = {
    "num_samples": "samples",
    "accuracy_guide": "guide, %",
    "accuracy_judge": "judge, %",
    "accuracy_gap": "guide − judge, %",
    "nonfinite": "non-finite",
    "images_per_second": "img/s",
    "peak_memory_mib": "memory, MiB",
}


def data_uri(content: bytes, kind: str) -> str:
    """An image's bytes as the address of an <img>; kind is `png` or `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _picture(content: bytes) -> dict[str, Any]:
    """A PNG to show: its address, and whether it will be enlarged, so that its pixels should stay crisp."""
    width, _ = Image.open(io.BytesIO(content)).size
    return {"uri": data_uri(content, "png"), "crisp": width <= 820}


def best_setup(rows: Sequence[Row]) -> Row | None:
    """The guided row with the lowest class-conditional distance; None where none has one."""
    conditional = frechet_columns(rows)[1]
    guided = [
        row
        for method, row in best_per_method(rows).items()
        if method != "unconditional" and math.isfinite(row[conditional])
    ]
    return min(guided, key=lambda row: row[conditional]) if guided else None


def setup_name(row: Row) -> str:
    label = method_label(row["method"])
    return label if row["method"] == "unconditional" else f"{label}, scale {format_scale(row['scale'])}"


def facts(context: ReportContext) -> list[tuple[str, str]]:
    """What a reader needs to place the numbers: title and value."""
    classes = context["classes"]
    facts = [
        ("data set", context.get("dataset", "")),
        ("target class", f"{context['target']}, one of {len(classes)}: {', '.join(classes)}"),
        ("chance", f"{100 / len(classes):.1f} %"),
    ]
    if "target_share" in context:
        facts.append((f"{context['target']} among training images", f"{format_percent(context['target_share'])} %"))
    facts += [
        ("diffusion steps T", str(context.get("T", ""))),
        ("samples per method and scale", f"{context['num_samples']:,}" if "num_samples" in context else ""),
        ("sampling starts from", context.get("start", "")),
    ]
    return [(title, value) for title, value in facts if value]


def count_claims(claims: Sequence) -> dict[str, int]:
    verdicts = [claim.holds for claim in claims]
    return {"hold": verdicts.count(True), "fail": verdicts.count(False), "unknown": verdicts.count(None)}


def summary(context: ReportContext, rows: Sequence[Row], claims: Sequence, chosen: Row | None) -> str:
    """The result in one paragraph."""
    conditional = frechet_columns(rows)[1]
    tally = count_claims(claims)
    text = (
        f"An unconditional diffusion model is guided towards the class {context['target']} by a classifier that was "
        "never trained on noise, and by one that was. "
    )
    if chosen is None:
        text += "No guided setup has a finite class-conditional distance. "
    else:
        text += (
            f"The best setup by class-conditional Fréchet distance is {setup_name(chosen)}: the judge finds "
            f"{format_percent(chosen['accuracy_judge'])} % {context['target']}, {conditional} is "
            f"{format_number(chosen[conditional])}"
        )
        unconditional = best_per_method(rows).get("unconditional")
        if unconditional is not None:
            text += (
                f"; without guidance {format_percent(unconditional['accuracy_judge'])} % and "
                f"{format_number(unconditional[conditional])}"
            )
        text += ". "
    text += f"Of the paper's {len(claims)} claims {tally['hold']} hold here, {tally['fail']} do not"
    return text + (f", {tally['unknown']} could not be measured." if tally["unknown"] else ".")


def published_comparison(experiment: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line per method at its best scale, with the published row of the same method or None."""
    everything, conditional = frechet_columns(rows)
    published = {row.method: row for row in paper.published_rows(experiment)}
    _, ties = best_and_ties(rows)
    intervals = [("accuracy_judge", True), ("accuracy_guide", True), (conditional, False), (everything, False)]
    intervals += [("precision", False), ("recall", False)]
    return [
        {
            "method": method_label(method),
            "scale": "" if method == "unconditional" else format_scale(row["scale"]),
            "edge": at_edge(rows, method),
            "tie": any(row is tie for tie in ties),
            "values": table_cells(row, everything, conditional),
            "intervals": [format_interval(row, *column) for column in intervals] + ["", ""],
            "published": published.get(method),
        }
        for method, row in best_per_method(rows).items()
    ]


def sweep_table(rows: Sequence[Row]) -> dict[str, list]:
    """The whole metrics.csv as text: titles, and lines with a mark for the best scale. Empty columns are left out."""
    best = best_per_method(rows)
    columns = [
        name
        for name in rows[0]
        if isinstance(rows[0][name], float)
        and name != "scale"
        and not name.endswith(("_lo", "_hi"))
        and any(not math.isnan(row[name]) for row in rows)
    ]
    lines = [
        {
            "method": method_label(method),
            "best": row is best[method],
            "values": [
                (format_scale(row["scale"]), ""),
                *((_cell(name, row[name]), format_interval(row, name, _is_share(name))) for name in columns),
            ],
        }
        for method in sort_methods(row["method"] for row in rows)
        for row in sorted((row for row in rows if row["method"] == method), key=lambda row: row["scale"])
    ]
    return {"titles": ["scale", *(COLUMN_TITLES.get(name, name) for name in columns)], "lines": lines}


def _is_share(column: str) -> bool:
    """Columns shown in percent."""
    return column.startswith("accuracy")


def _cell(column: str, value: float) -> str:
    if _is_share(column):
        return format_percent(value)
    if column.startswith("num_") or column in ("nonfinite", "peak_memory_mib"):
        return format_count(value)
    return format_number(value, 4 if "d_" in column or "id" in column else 3)


def drawing_uri(folder: Path, name: str) -> str | None:
    """The address of a figure: its drawing where there is one, else its pixels; None where there is neither."""
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        path = folder / f"{name}{suffix}"
        if path.exists():
            return data_uri(path.read_bytes(), kind)
    return None


def shown_figures(folder: Path) -> list[dict[str, str]]:
    """The figures there are."""
    found = []
    for name, (source, caption) in CAPTIONS.items():
        uri = drawing_uri(folder, name)
        if uri is not None:
            found.append({"name": name, "source": source, "caption": caption, "uri": uri})
    return found


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Scale images down to at most `side` pixels high, so that a report can be mailed; smaller ones stay.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
    """
    _, height, width, channels = images.shape
    if height <= side:
        return images
    size = (max(1, round(width * side / height)), side)
    small = [Image.fromarray(image if channels == 3 else image[..., 0]).resize(size, Image.LANCZOS) for image in images]
    return np.stack([np.asarray(image).reshape(size[1], size[0], channels) for image in small])


def method_strips(rows: Sequence[Row], samples_dir: str | os.PathLike) -> tuple[list[dict[str, Any]], int | None]:
    """The first samples of each method at its best scale, and the samples' height in pixels."""
    conditional = frechet_columns(rows)[1]
    strips, size = [], None
    for method, row in best_per_method(rows).items():
        images = load_samples(samples_dir, method, row["scale"], STRIP_COLUMNS)
        if images is None:
            continue
        size = images.shape[1]
        strips.append(
            {
                "name": setup_name(row),
                "numbers": f"judge {format_percent(row['accuracy_judge'])} %, "
                f"{conditional} {format_number(row[conditional])}",
                **_picture(png_bytes(sample_grid(shrink(images, 96), STRIP_COLUMNS, 2))),
            }
        )
    return strips, size


def gallery(row: Row | None, samples_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The first samples of the best setup in a square."""
    images = load_samples(samples_dir, row["method"], row["scale"], GALLERY) if row else None
    if images is None:
        return None
    columns = math.ceil(math.sqrt(len(images)))
    grid = sample_grid(shrink(images, 64), columns, 1)
    return {"name": setup_name(row), "count": len(images), **_picture(png_bytes(grid))}


def training_record(folder: Path) -> dict[str, Any]:
    """The DDPM's loss curve and sample grid; None for what is not there. A curve that cannot be read is left out."""
    found: dict[str, Any] = dict.fromkeys(("loss", "words", "samples"))
    rows = []
    if (folder / "training.csv").exists():
        try:
            rows = read_csv(folder / "training.csv", ("epoch", "train_loss"))
        except DataError as error:
            print(f"nrcg: warning: {error}; the report leaves out the loss curve", file=sys.stderr)
            found["words"] = "without a loss curve: its training.csv cannot be read"
    if rows:
        last = rows[-1]
        if last["epoch"] == 0 or math.isnan(last["train_loss"]):
            found["words"] = f"pretrained ({_origin(folder)}), not trained here"
        else:
            found["loss"] = data_uri(render(lambda: training_loss(rows), "svg"), "svg+xml")
            epochs, loss = format_count(last["epoch"]), format_number(last["train_loss"])
            found["words"] = f"{epochs} epochs, last training loss {loss}"
        if not math.isnan(last.get("val_loss", math.nan)):
            found["words"] += f", validation loss {format_number(last['val_loss'])}"
    if (folder / "samples.png").exists():
        found["samples"] = _picture((folder / "samples.png").read_bytes())
    return found


def _origin(folder: Path) -> str:
    """Where a pretrained model came from, as training.json says."""
    try:
        origin = json.loads((folder / "training.json").read_text())["pretrained"]
        return "@".join(filter(None, (origin["source"], origin["revision"])))
    except (OSError, ValueError, KeyError, TypeError):
        return "source unknown"


def quality(path: str | os.PathLike | None) -> dict[str, dict]:
    """Role -> how good the classifier is on clean images, from reference.json."""
    if path is None or not Path(path).exists():
        return {}
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))["classifiers"]
        return {role: {"ece": [float(value) for value in record[role]["ece"]]} for role in ROLES}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"no record of the references ({error})", path) from None


def classifier_records(folder: Path, num_steps: int | None, reference_json: str | os.PathLike | None) -> dict[str, Any]:
    """Table and figure of the trained classifiers, as far as they are there."""
    quality_of = quality(reference_json)
    lines, tables = [], {}
    for role in ROLES:
        path = folder / role / "config.json"
        if not path.exists():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            accuracy = float(config.get("validation_accuracy", math.nan))
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}: no classifier's settings ({error}); delete the folder and train it anew"
            ) from None
        lines.append(
            {
                "role": role,
                "architecture": config.get("architecture", ""),
                "accuracy": format_percent(accuracy),
                "ece": format_percent(quality_of[role]["ece"][0]) if role in quality_of else "-",
            }
        )
        table = folder / role / "accuracy_over_t.csv"
        if table.exists():
            tables[role] = read_csv(table, ("t", "accuracy"))
    last = num_steps or max((row["t"] for rows in tables.values() for row in rows), default=0)
    steps = sorted({round(share * last) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)})
    for line in lines:
        line["over_t"] = [_nearest(tables.get(line["role"], []), step) for step in steps] if tables else []
    figure = data_uri(render(lambda: classifier_accuracy(tables), "svg"), "svg+xml") if tables else None
    return {"lines": lines, "steps": steps if tables else [], "figure": figure}


def _nearest(rows: Sequence[Row], t: float) -> str:
    """Accuracy at the measured step nearest to t, in percent."""
    if not rows:
        return "-"
    return format_percent(min(rows, key=lambda row: abs(row["t"] - t))["accuracy"])


def betas(context: ReportContext) -> str | None:
    """What the published betas become at another number of steps; None where they stay what they are."""
    num_steps = context.get("T")
    if num_steps in (None, 400) or context.get("settings", {}).get("sampling", {}).get("betas_per_step"):
        return None
    return ", ".join(f"{beta:g} is {scaled_beta(beta, num_steps):.4g}" for beta in (0.9, 0.99, 0.999))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines of dotted key and value."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines += flatten(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return lines
