"""The plan of an experiment as a table, and what stands below it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import EngFormatter

from nrcg.config import ExperimentConfig
from nrcg.pipeline.plan import Costs, Counts, Step

HEADER = ("step", "jobs", "done", "images", "U-Net forward", "backward")
_bytes = EngFormatter("B", places=1)


def plan_rows(steps: Sequence[Step], costs: Costs | None) -> list[tuple[str, ...]]:
    """The table's cells, header and total with it."""
    hours = [] if costs is None else ["hours" if costs.cores else "GPU hours"]
    rows = [(*HEADER, *hours, "disk")]
    for step in steps:
        bound = f"{step.bound} " if step.bound else ""
        cells = [step.name, f"{step.jobs:,}", f"{step.done:,}", "" if step.rule == "report" else _count(step.images)]
        cells += [f"{bound}{_count(count)}" if count else "" for count in (step.forward, step.backward)]
        if costs is not None:
            found = step.hours(costs)
            unknown = found is None or (step.images is None and step.rule != "report")
            cells.append("?" if unknown else f"{bound}{_hours(found)}")
        rows.append((*cells, "?" if step.disk is None else _bytes(step.disk) if step.disk else ""))
    # A sum is a bound where all of its bounds are of one kind.
    kinds = {step.bound for step in steps if step.bound and (step.forward or step.rule == "train_ddpm")}
    bound = f"{kinds.pop()} " if len(kinds) == 1 else "about " if kinds else ""
    total = ["all", f"{sum(s.jobs for s in steps):,}", f"{sum(s.done for s in steps):,}", ""]
    total += [bound + _count(sum(s.forward for s in steps)), bound + _count(sum(s.backward for s in steps))]
    if costs is not None:
        found, complete = total_hours(steps, costs)
        total.append(("" if complete else ">= ") + _hours(found))
    known = sum(step.disk or 0 for step in steps)
    total.append((">= " if any(step.disk is None for step in steps) else "") + _bytes(known))
    return [*rows, tuple(total)]


def total_hours(steps: Sequence[Step], costs: Costs, left: bool = False) -> tuple[float, bool]:
    """Hours of all steps, or of the jobs that are not done; and whether every step's are known."""
    total, complete = 0.0, True
    for step in steps:
        share = 1 - step.done / step.jobs if left else 1.0
        hours = step.hours(costs)
        complete &= not share or (hours is not None and step.bound != ">=")
        total += share * (hours or 0.0)
    return total, complete


def plan_notes(
    settings: ExperimentConfig,
    steps: Sequence[Step],
    costs: Costs | None,
    counts: Counts,
    parameters: Mapping[str, int],
    root: Path = Path(),
) -> list[str]:
    """What stands below the table: how sure the numbers are, what is left to do, and warnings."""
    notes = [counts.origin] if counts.origin else []
    if any(step.bound == "<=" for step in steps):
        notes.append("<=: at most; how much skip_above saves is not known before")
    if settings.ddpm.pretrained is None and "unet" in parameters:
        size = _bytes(16 * parameters["unet"])  # weights, two moments and the weight EMA in float32
        notes.append(f"disk: while the diffusion model trains, {size} more for its checkpoint")
    if costs is not None:
        notes += costs.notes
        if any(step.hours(costs) is None for step in steps):
            notes.append("?: not known before, and not in the sum of the hours")
        hours, complete = total_hours(steps, costs)
        notes.append(f"time: {_at_least(hours, complete)} on {costs.device}, if nothing else runs there")
        done, jobs = sum(step.done for step in steps), sum(step.jobs for step in steps)
        if done:
            left = _at_least(*total_hours(steps, costs, left=True))
            notes.append(f"done: {done:,} of {jobs:,} jobs have results; the rest takes {left}")
        if costs.cores is not None and hours > 12:
            notes.append(f"warning: no GPU is used: on this device this takes {duration(hours)}")
    needed = sum((step.disk or 0) * (1 - step.done / step.jobs) for step in steps)
    free = shutil.disk_usage(root).free
    if needed > free:
        notes.append(f"warning: {_bytes(round(needed))} of disk are needed, {_bytes(free)} are free here")
    return notes


def _at_least(hours: float, complete: bool) -> str:
    return ("" if complete else "at least ") + duration(hours)


def duration(hours: float) -> str:
    """Hours in words, two digits: 40 seconds, 22 minutes, 3.5 hours, 12 days, 5.2 years."""
    year = 24 * 365.25
    for unit, size, least in (("years", year, 2), ("days", 24, 2), ("hours", 1, 1.5), ("minutes", 1 / 60, 1.5)):
        if hours >= least * size:
            return f"{_digits(hours / size)} {unit}"
    return f"{_digits(hours * 3600)} seconds"


def _digits(number: float) -> str:
    """Two significant digits, more before the point."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


def _hours(hours: float) -> str:
    decimals = 0 if hours >= 99.5 else 1 if hours >= 9.95 else 2 if hours >= 0.0995 else 3
    return f"{hours:,.{decimals}f}"


def _count(count: int | None) -> str:
    """Exact below 100,000, else with k, M or G."""
    return "?" if count is None else f"{count:,}" if count < 100_000 else EngFormatter(places=1)(count)
