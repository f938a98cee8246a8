"""The search over scale, interval and stabilizer together: successive halving over settings drawn at random.

Many settings are measured with few samples, the better half of them with twice as many, and so on to the whole number
(Jamieson and Talwalkar 2016). What is drawn follows from the seed alone and each measurement is journaled, so that a
killed search goes on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nrcg.config import MethodConfig, StabilizerConfig, stabilizer_name
from nrcg.csv_files import Row, write_csv
from nrcg.errors import ConfigError
from nrcg.pipeline.tune import AROUND, objective_of, read_journal, worth
from nrcg.report.best import best_rule, differ

RUNGS = 3
"""Sample counts: a quarter, a half, the whole."""
DIMENSIONS = ("scale", "interval", "stabilizer")
STABILIZERS: tuple[dict[str, Any], ...] = (
    {"name": "none"},
    {"name": "ema", "beta": 0.9},
    {"name": "ema", "beta": 0.99},
    {"name": "adam", "beta1": 0.9, "beta2": 0.999, "eps": 1e-4},
)
"""Those of the paper, betas at 400 steps."""
ADAM_RATIO = 50.0
"""ADAM's steps are of size one whatever the gradient: its scales are this much smaller (the published sweeps)."""
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Ends of the intervals that are drawn, in t / T."""


@dataclass(frozen=True)
class Candidate:
    """A setting that is tried.

    Attributes:
        scale: s.
        schedule: Its course, as in the configuration, what is not its default.
        stabilizer: As in the configuration.
    """

    scale: float
    schedule: Mapping[str, Any]
    stabilizer: Mapping[str, Any]

    def key(self) -> str:
        """What it is called in the journal."""
        return " ".join((f"{self.scale:g}", self.course(), "_".join(map(str, self.stabilizer.values()))))

    def course(self) -> str:
        """Of the scale, in a word: whole, interval_0.2_0.6."""
        return "_".join(map(str, self.schedule.values())) or "whole"

    def method(self, base: MethodConfig) -> MethodConfig:
        """A method with these settings in the place of its own."""
        changed = {"stabilizer": dict(self.stabilizer), "scale_schedule": dict(self.schedule)}
        return MethodConfig.model_validate(base.model_dump() | changed)


def check_dimensions(over: Sequence[str]) -> None:
    """Raise ConfigError for what is none of DIMENSIONS."""
    for name in over:
        if name not in DIMENSIONS:
            raise ConfigError(f"--over: {name!r} is unknown; allowed: {', '.join(DIMENSIONS)}")


def draw_candidates(
    base: MethodConfig,
    count: int,
    *,
    over: Sequence[str],
    low: float,
    high: float,
    informed: tuple[float, float] | None,
    seed: int = 0,
) -> list[Candidate]:
    """Settings to try, all different: at first the method's own at the middle of the range of scales, on a log scale.

    Args:
        base: The method.
        count: How many.
        over: What varies, of DIMENSIONS; the rest is the method's own.
        low, high: Range of scales for the method's own stabilizer; ADAM_RATIO tells ADAM's from the others'.
        informed: The interval of the forward analysis, a third of the intervals drawn; None: not known.
        seed: Of the draws.
    """
    draws = random.Random(seed)
    own = {key: value for key, value in base.stabilizer.model_dump().items() if value is not None}
    own_schedule = base.scale_schedule.model_dump(exclude_defaults=True)

    def candidate(first: bool) -> Candidate:
        stabilizer = own if first or "stabilizer" not in over else draws.choice(STABILIZERS)
        schedule = own_schedule if first or "interval" not in over else _interval(draws, informed)
        share = draws.random() if "scale" in over and not first else 0.5
        scale = math.exp(math.log(low) + share * math.log(high / low))
        shrink = ADAM_RATIO ** ((stabilizer["name"] == "adam") - (own["name"] == "adam"))
        return Candidate(float(f"{scale / shrink:.3g}"), schedule, stabilizer)

    found = {(first := candidate(True)).key(): first}
    for _ in range(100 * count):
        if len(found) >= count:
            break
        found.setdefault((one := candidate(False)).key(), one)
    return list(found.values())


def _interval(draws: random.Random, informed: tuple[float, float] | None) -> dict[str, Any]:
    """The whole trajectory, the informed part of it, or any."""
    kind = draws.randrange(3)
    low, high = sorted(draws.sample(EDGES, 2))
    if kind == 1 and informed is not None:
        low, high = informed
    return {} if kind == 0 or (low, high) == (0.0, 1.0) else {"name": "interval", "low": low, "high": high}


def plan(budget: int, num_samples: int, least: int) -> list[tuple[int, int]]:
    """(settings, samples of each) of each rung: of equal cost, together `budget` settings' of num_samples.

    Args:
        budget: Settings that could be measured with num_samples each.
        num_samples: Of the last rung.
        least: Samples that an evaluation needs.
    """
    last = max(1, budget // RUNGS)
    rungs = [(last * 2**back, max(least, num_samples // 2**back)) for back in reversed(range(RUNGS))]
    return [(count, min(samples, num_samples)) for count, samples in rungs]


def search_jointly(
    measure: Callable[[Candidate, int], Row],
    candidates: Sequence[Candidate],
    rungs: Sequence[tuple[int, int]],
    *,
    best_by: str,
    journal: str | Path,
    settings: str,
    on_row: Callable[[Row, int], object] = lambda row, number: None,
) -> list[Row]:
    """Successive halving.

    Args:
        measure: A setting and a number of samples to a row of metrics.
        candidates: For the first rung.
        rungs: `plan`.
        best_by: Rule of `nrcg.report.best.BEST_BY`.
        journal: CSV; every measured row is added at once.
        settings: Fingerprint of everything else that decides a row.
        on_row: Called with each row, also those of the journal, and its number from 0.

    Returns:
        The rows in the order of measurement; the last rung's are those with the most samples.
    """
    kept = read_journal(journal)
    known = {(row["setting"], row["num_samples"]): row for row in kept if row["settings"] == settings}
    rows: list[Row] = []
    left = list(candidates)
    for count, samples in rungs:
        left, measured = left[:count], []
        for one in left:
            row = known.get((one.key(), float(samples)))
            if row is None:
                told = {"settings": settings, "setting": one.key(), "scale": one.scale, "schedule": one.course()}
                row = {**measure(one, samples), **told, "stabilizer": _name(one), "num_samples": samples}
                kept.append(row)
                known[one.key(), float(samples)] = row
                write_csv(journal, kept, list(dict.fromkeys(column for each in kept for column in each)))
            rows.append(row)
            measured.append(row)
            on_row(row, len(rows) - 1)
        order = sorted(range(len(left)), key=lambda place: (worth(objective_of(measured[place], best_by)), place))
        left = [left[place] for place in order]
    return rows


def best_of(rows: Sequence[Row], best_by: str) -> tuple[Row, list[Row]]:
    """The best setting of the last rung, and those that the 95 % intervals do not tell from it.

    Among these the one with the highest coverage is taken: at equal distance, the one that draws more of the class.
    """
    most = max(float(row["num_samples"]) for row in rows)
    last = [row for row in rows if row["num_samples"] == most]
    column = best_rule([last[0] | {"best_by": best_by}])[0]
    lowest = min(last, key=lambda row: worth(objective_of(row, best_by)))
    alike = [row for row in last if row is lowest or not differ(lowest, row, column)]
    best = max(alike, key=lambda row: (_or_zero(row.get("coverage")), -worth(objective_of(row, best_by))))
    return best, [row for row in alike if row is not best]


def joint_table(rows: Sequence[Row], best_by: str) -> list[tuple[str, ...]]:
    """Cells of the settings by rung, the best one marked, with a header."""
    from nrcg.report.tables import format_interval, format_number

    best, _ = best_of(rows, best_by)
    column = best_rule([rows[0] | {"best_by": best_by}])[0]
    further = [name for name in ("accuracy_judge", "coverage") if name in rows[0]]
    cells = [("samples", "stabilizer", "schedule", "scale", column, "95 % interval", *further, "")]
    for row in sorted(rows, key=lambda row: (-float(row["num_samples"]), worth(objective_of(row, best_by)))):
        numbers = [format_number(row[name], 3) for name in further]
        values = (format_number(row[column]), format_interval(row, column))
        told = (f"{row['num_samples']:g}", str(row["stabilizer"]), str(row["schedule"]), f"{row['scale']:g}")
        cells.append((*told, *values, *numbers, "best" if row is best else ""))
    return cells


def joint_notes(rows: Sequence[Row], best_by: str) -> list[str]:
    """What to know before the best setting is believed."""
    best, alike = best_of(rows, best_by)
    if not alike:
        return []
    column = best_rule([best | {"best_by": best_by}])[0]
    names = "; ".join(str(row["setting"]) for row in alike)
    return [
        f"the 95 % intervals of {column} do not tell {names} from the best, which has the highest coverage of them;"
        " more --num-samples would"
    ]


def joint_block(experiment: str, method: str, found: Candidate, base: MethodConfig) -> str:
    """The method with what was found, and its sweep, as a piece of config.yaml."""
    name = f"{method}_tuned"
    given = found.method(base).model_dump(exclude_defaults=True)
    scales = sorted({float(f"{found.scale * factor:.2g}") for factor in AROUND})
    block = {"methods": {name: given}, "experiments": {experiment: {"sweep": {name: scales}}}}
    return f"# For config.yaml.\n{yaml.safe_dump(block, default_flow_style=None, sort_keys=False, width=1000)}"


def _name(one: Candidate) -> str:
    return stabilizer_name(StabilizerConfig.model_validate(dict(one.stabilizer)))


def _or_zero(value: Any) -> float:
    return 0.0 if value is None or math.isnan(value) else float(value)
