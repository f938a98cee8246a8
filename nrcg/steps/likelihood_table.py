"""Tables and figure of a likelihood, from the numbers of its images. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrcg import tracking
from nrcg.config import LikelihoodStep
from nrcg.csv_files import write_csv
from nrcg.errors import DataError
from nrcg.files import atomic_write_text, load_arrays

ARRAYS = ("nats", "terms", "mse_eps", "mse_x0", "flow")
"""Of N images and T steps: nats (N,), terms and errors (N, T + 1), and where it was measured flow (N,) in bits/dim."""


def write_tables(whole: Mapping[str, np.ndarray], record: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """likelihood.csv by t, images.csv by image, likelihood.json with the totals.

    Args:
        whole: ARRAYS of all images.
        record: How they were measured; `dims` is D.
        out: Folder to write to.

    Returns:
        What likelihood.json holds: each total as (mean, standard error) over the images, and the record.
    """
    unit = record["dims"] * math.log(2)
    bits = whole["nats"] / unit
    rows = [row_of(t, whole, unit) for t in range(whole["terms"].shape[1])]
    write_csv(out / "likelihood.csv", rows, list(rows[0]))
    columns = {"bits_per_dim": bits} | ({"flow_bits_per_dim": whole["flow"]} if "flow" in whole else {})
    images = [{"image": i} | {name: float(column[i]) for name, column in columns.items()} for i in range(len(bits))]
    write_csv(out / "images.csv", images, ["image", *columns])
    totals = {name: list(mean_and_error(column)) for name, column in columns.items()}
    found = totals | {"num_images": len(bits)} | dict(record)
    atomic_write_text(out / "likelihood.json", json.dumps(found, indent=1) + "\n")
    return found


def join_likelihood(settings: LikelihoodStep, *, shards: Sequence[Path], out: Path) -> dict[str, Any]:
    """The shards of an experiment's likelihood as tables and figure, and as a tracking run.

    Args:
        settings: The experiment's settings.
        shards: What `measure_shard` wrote, in the images' order.
        out: Folder to write to.

    Returns:
        What likelihood.json holds.

    Raises:
        DataError: A shard is damaged.
    """
    from nrcg.report.likelihood import save_likelihood_figure

    parts = [load_arrays(path) for path in shards]
    for path, part in zip(shards, parts, strict=True):
        if missing := {*ARRAYS[:4], "record"} - set(part):
            raise DataError(f"damaged (without {', '.join(sorted(missing))})", path)
    record = json.loads(str(parts[0]["record"]))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS if name in parts[0]}
    found = write_tables(whole, record, out)
    save_likelihood_figure(out)
    with tracking.run(
        settings.experiment, "likelihood", kind="likelihood", params=settings.model_dump(), deferred=True
    ) as run:
        numbers = {name: found[name][0] for name in ("bits_per_dim", "flow_bits_per_dim") if name in found}
        run.log_metrics(numbers | {f"{name}_se": found[name][1] for name in numbers})
        for t in range(whole["terms"].shape[1]):
            term = mean_and_error(whole["terms"][:, t])[0] / (record["dims"] * math.log(2))
            if math.isfinite(term):
                run.log_metrics({"bits_per_dim_of_t": term}, step=t)
        for name in ("likelihood.csv", "images.csv", "bits_per_dim.png"):
            run.log_artifact(out / name)
    return found


def row_of(t: int, whole: Mapping[str, np.ndarray], unit: float) -> dict[str, float]:
    """Column t of the terms, L_t: mean and standard error in bits per dimension; and the errors at t."""
    term, error = mean_and_error(whole["terms"][:, t] / unit)
    drawn = int(np.isfinite(whole["terms"][:, t]).sum())
    row = {"t": t, "bits_per_dim": term, "bits_per_dim_se": error, "num_images": drawn}
    return row | {name: mean_and_error(whole[name][:, t])[0] for name in ("mse_eps", "mse_x0")}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, without what is not a number; nan where there is too little."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
