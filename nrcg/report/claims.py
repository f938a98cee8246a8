"""The paper's claims, held against measured results.

Each claim is decided by a rule fixed beforehand and stated in the docstring of its function; the numbers stand
beside the verdict, whichever way it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nrcg.csv_files import Row
from nrcg.layout import format_scale
from nrcg.report import paper
from nrcg.report.best import best_per_method, differ
from nrcg.report.columns import frechet_columns, method_label
from nrcg.report.tables import format_count, format_number, format_percent

CHANCE_MARGIN = 0.10
"""Accuracy within this of 1 / classes is chance."""
X0_MARGIN = 0.20
"""Accuracy that x0 must add where the plain classifier has fallen to chance."""
STABILITY_FACTOR = 1.1
"""Mean gradient sensitivity up to this times the robust classifier's reaches it."""
ACCURACY_MARGIN = 0.15
"""Accuracy gained over unconditional sampling that counts as guidance."""
NOISE_FACTOR = 2.0
"""Class-conditional Fréchet distance from this times the unconditional one on is noise, not images."""
EMA99 = "non_robust_x0_ema99"


@dataclass(frozen=True)
class Claim:
    """A published claim and what was measured.

    Attributes:
        text: what the paper says.
        source: its figure or table.
        measured: a sentence with our numbers and the rule, or why nothing could be measured.
        holds: True, False, or None when it could not be measured.
    """

    text: str
    source: str
    measured: str
    holds: bool | None


def check_claims(
    forward_rows: Sequence[Row], metric_rows: Sequence[Row], *, num_classes: int, target: str
) -> list[Claim]:
    """Hold the paper's claims against measured results.

    Args:
        forward_rows: rows of forward.csv, t = 1..T; empty if there are none.
        metric_rows: rows of metrics.csv; empty if there are none.
        num_classes: number of classes K; chance is 1 / K.
        target: name of the class to generate.

    Returns:
        All claims, in the order of the paper.
    """
    return [
        *_accuracy_claims(forward_rows, 1 / num_classes),
        *_sensitivity_claims(forward_rows),
        *_stabilizer_claims(forward_rows),
        *_sampling_claims(metric_rows, target),
    ]


def _claim(key: str, measured: str, holds: bool | None) -> Claim:
    published = paper.CLAIMS[key]
    return Claim(published.text, published.source, measured, holds)


def _unmeasured(*methods: str) -> str:
    return f"Not measured: no finite value of {' and '.join(method_label(method) for method in methods)}."


def _series(rows: Sequence[Row], method: str, column: str) -> dict[int, float]:
    """Finite values of a method over t, t ascending."""
    found = {int(row["t"]): row[column] for row in rows if row["method"] == method}
    return {t: found[t] for t in sorted(found) if math.isfinite(found[t])}


def _accuracy_claims(rows: Sequence[Row], chance: float) -> list[Claim]:
    """Fig. 1. Chance is reached at the first t with accuracy <= 1 / K + 0.10. With x0, accuracy must be at least
    0.20 higher at that t (at T / 2 if chance is never reached)."""
    plain = _series(rows, "non_robust", "accuracy")
    denoised = _series(rows, "non_robust_x0", "accuracy")
    if not plain:
        keys = ("falls_to_chance", "falls_in_a_quarter", "x0_stays_accurate")
        return [_claim(key, _unmeasured("non_robust"), None) for key in keys]
    last = max(plain)
    fallen = next((t for t, accuracy in plain.items() if accuracy <= chance + CHANCE_MARGIN), None)
    level = f"chance {format_percent(chance)} % + 10 points"
    if fallen is None:
        lowest = min(plain, key=plain.get)
        measured = f"Never within {level}: lowest accuracy {format_percent(plain[lowest])} % at t = {lowest} of {last}."
        share = math.inf
    else:
        share = fallen / last
        measured = (
            f"Accuracy {format_percent(plain[fallen])} % ({level}) first at t = {fallen} of {last}: "
            f"{format_percent(share)} % of the steps."
        )
    claims = [
        _claim("falls_to_chance", measured, share < 0.5),
        _claim("falls_in_a_quarter", measured, share < 0.25),
    ]
    at = fallen if fallen is not None else min(plain, key=lambda t: abs(t - last / 2))
    if at not in denoised:
        return [*claims, _claim("x0_stays_accurate", _unmeasured("non_robust_x0"), None)]
    gain = denoised[at] - plain[at]
    measured = (
        f"At t = {at} of {last}: {format_percent(denoised[at])} % with x0, {format_percent(plain[at])} % without: "
        f"{100 * gain:+.1f} points (20 or more wanted)."
    )
    return [*claims, _claim("x0_stays_accurate", measured, _at_least(gain, X0_MARGIN))]


def _at_least(value: float, bound: float) -> bool:
    """value >= bound, where both come from differences of decimal fractions."""
    return value >= bound - 1e-9


def _paired(rows: Sequence[Row], methods: Sequence[str], column: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values of several methods at the steps where all are finite: t (n,), one array (n,) per method."""
    series = [_series(rows, method, column) for method in methods]
    steps = [t for t in series[0] if all(t in other for other in series)]
    return np.array(steps), [np.array([values[t] for t in steps]) for values in series]


def _sensitivity_claims(rows: Sequence[Row]) -> list[Claim]:
    """Figs. 2 and 3. The mean over t of the mean over images must be larger."""
    claims = []
    for quantity in ("logit", "gradient"):
        for higher, lower, key in (
            ("non_robust", "non_robust_x0", "non_robust_above_x0"),
            ("non_robust_x0", "robust", "x0_above_robust"),
        ):
            _, (above, below) = _paired(rows, (higher, lower), f"{quantity}_sensitivity_mean")
            if not above.size:
                claims.append(_claim(f"{quantity}_{key}", _unmeasured(higher, lower), None))
                continue
            measured = (
                f"Mean over t of {method_label(higher)}: {format_number(above.mean())}, {method_label(lower)}: "
                f"{format_number(below.mean())} ({_ratio(above.mean(), below.mean())}); "
                f"larger at {format_percent(np.mean(above > below))} % of the steps."
            )
            claims.append(_claim(f"{quantity}_{key}", measured, bool(above.mean() > below.mean())))
    return claims


def _ratio(a: float, b: float) -> str:
    return f"{format_number(a / b, 3)} times" if b else "no ratio: divisor 0"


def _stabilizer_claims(rows: Sequence[Row]) -> list[Claim]:
    """Fig. 4. EMA 0.99: mean over t <= T / 2, and over all t, at most 1.1 times the robust classifier's. ADAM: the
    last quarter's mean is above the first quarter's and the rank correlation with t is positive."""
    column = "gradient_sensitivity_mean"
    claims = []
    steps, (ema, robust) = _paired(rows, (EMA99, "robust"), column)
    last = max((int(row["t"]) for row in rows), default=0)
    for key, chosen, words in (
        ("ema99_reaches_robust_early", steps <= last / 2, f"t <= {last // 2}"),
        ("ema99_reaches_robust", steps <= last, "all t"),
    ):
        if not chosen.any():
            claims.append(_claim(key, _unmeasured(EMA99, "robust"), None))
            continue
        ours, theirs = ema[chosen].mean(), robust[chosen].mean()
        measured = (
            f"Mean over {words} of EMA 0.99: {format_number(ours)}, robust: {format_number(theirs)} "
            f"({_ratio(ours, theirs)}, at most {STABILITY_FACTOR:g} wanted)."
        )
        claims.append(_claim(key, measured, bool(ours <= STABILITY_FACTOR * theirs)))
    adam = _series(rows, "non_robust_x0_adam", column)
    if len(adam) < 4:
        return [*claims, _claim("adam_worsens", _unmeasured("non_robust_x0_adam"), None)]
    values = np.array(list(adam.values()))
    quarter = len(values) // 4
    first, final = values[:quarter].mean(), values[-quarter:].mean()
    correlation = rank_correlation(np.array(list(adam)), values)
    measured = (
        f"Mean over the first quarter of the steps {format_number(first)}, over the last {format_number(final)} "
        f"({_ratio(final, first)}); rank correlation with t {correlation:+.2f}."
    )
    return [*claims, _claim("adam_worsens", measured, bool(final > first and correlation > 0))]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays, ties at their mean rank; nan where one is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def _sampling_claims(rows: Sequence[Row], target: str) -> list[Claim]:
    """Figs. 5 to 8, each method at its best scale."""
    if not rows:
        keys = list(paper.CLAIMS)[list(paper.CLAIMS).index("non_robust_fails") :]
        return [_claim(key, "Not measured: no samples were evaluated.", None) for key in keys]
    conditional = frechet_columns(rows)[1]
    best = best_per_method(rows)
    return [
        _non_robust_fails(rows, best.get("unconditional"), conditional, target),
        _lowest(best, conditional),
        _lower(best, "robust", conditional, "ema99_beats_robust"),
        _more_of_class(best, target),
        _lower(best, "unconditional", conditional, "ema99_below_unconditional"),
    ]


def _at(row: Row) -> str:
    """A row's method and scale in words."""
    label = method_label(row["method"])
    return label if row["method"] == "unconditional" else f"{label} at scale {format_scale(row['scale'])}"


def _diverged(row: Row) -> bool:
    """A sampling run without a distance because samples are not finite: it was measured, and it failed."""
    return row["nonfinite"] > 0


def _non_robust_fails(rows: Sequence[Row], unconditional: Row | None, conditional: str, target: str) -> Claim:
    """Every scale of the plain non-robust classifier gains less than 15 points of judge accuracy over unconditional
    sampling, or has at least twice its class-conditional distance, or no finite samples."""
    key = "non_robust_fails"
    tried = [row for row in rows if row["method"] == "non_robust"]
    if not tried or unconditional is None:
        return _claim(key, _unmeasured("non_robust", "unconditional"), None)
    base_accuracy, base_distance = unconditional["accuracy_judge"], unconditional[conditional]
    if not (math.isfinite(base_accuracy) and math.isfinite(base_distance)):
        return _claim(key, _unmeasured("unconditional"), None)
    verdicts = []
    for row in tried:
        if math.isnan(row[conditional]) or math.isnan(row["accuracy_judge"]):
            verdicts.append(True if _diverged(row) else None)
        else:
            gained = _at_least(row["accuracy_judge"] - base_accuracy, ACCURACY_MARGIN)
            verdicts.append(not gained or row[conditional] >= NOISE_FACTOR * base_distance)
    words = "; ".join(
        f"scale {format_scale(row['scale'])}: {format_percent(row['accuracy_judge'])} % {target}, "
        f"{conditional} {format_number(row[conditional])}"
        for row in sorted(tried, key=lambda row: row["scale"])
    )
    measured = (
        f"Judge and {conditional} at every scale: {words}; unconditional: {format_percent(base_accuracy)} %, "
        f"{format_number(base_distance)}. Failure: less than 15 points gained, or twice the distance."
    )
    holds = False if False in verdicts else (None if None in verdicts else True)
    return _claim(key, measured, holds)


def _without_distance(row: Row | None, key: str) -> Claim | None:
    """The verdict where EMA 0.99 has no finite distance: failed if its samples are not finite, else not measured."""
    if row is None:
        return _claim(key, _unmeasured(EMA99), None)
    if _diverged(row):
        return _claim(key, f"{_at(row)}: {format_count(row['nonfinite'])} samples are not finite, no distance.", False)
    return _claim(key, _unmeasured(EMA99), None)


def _has_distance(row: Row | None, conditional: str) -> bool:
    return row is not None and math.isfinite(row[conditional])


def _lowest(best: dict[str, Row], conditional: str) -> Claim:
    """The distance of EMA 0.99 is below that of every other method."""
    key = "ema99_best_cfid"
    ours = best.get(EMA99)
    if not _has_distance(ours, conditional):
        return _without_distance(ours, key)
    others = [row for method, row in best.items() if method != EMA99 and _has_distance(row, conditional)]
    if not others:
        return _claim(key, "Not measured: no other method has a finite distance.", None)
    rival = min(others, key=lambda row: row[conditional])
    measured = (
        f"{conditional} of {_at(ours)}: {format_number(ours[conditional])}; best of the {len(others)} others, "
        f"{_at(rival)}: {format_number(rival[conditional])}." + _unsupported(ours, rival, conditional)
    )
    return _claim(key, measured, ours[conditional] < rival[conditional])


def _lower(best: dict[str, Row], rival: str, conditional: str, key: str) -> Claim:
    """The distance of EMA 0.99 is below the rival's."""
    ours, theirs = best.get(EMA99), best.get(rival)
    if not _has_distance(ours, conditional):
        return _without_distance(ours, key)
    if not _has_distance(theirs, conditional):
        return _claim(key, _unmeasured(rival), None)
    measured = (
        f"{conditional} of {_at(ours)}: {format_number(ours[conditional])}, {_at(theirs)}: "
        f"{format_number(theirs[conditional])}." + _unsupported(ours, theirs, conditional)
    )
    return _claim(key, measured, ours[conditional] < theirs[conditional])


def _more_of_class(best: dict[str, Row], target: str) -> Claim:
    """The judge finds at least 15 points more of the class than among unconditional samples."""
    key = "ema99_accuracy"
    ours, theirs = best.get(EMA99), best.get("unconditional")
    if ours is None or theirs is None:
        return _claim(key, _unmeasured(EMA99, "unconditional"), None)
    if math.isnan(ours["accuracy_judge"]):
        return _without_distance(ours, key)
    gain = ours["accuracy_judge"] - theirs["accuracy_judge"]
    if math.isnan(gain):
        return _claim(key, _unmeasured("unconditional"), None)
    measured = (
        f"Share of {target} by the judge: {_at(ours)}: {format_percent(ours['accuracy_judge'])} %, "
        f"unconditional: {format_percent(theirs['accuracy_judge'])} %: {100 * gain:+.1f} points (15 or more wanted)."
        + _unsupported(ours, theirs, "accuracy_judge")
    )
    return _claim(key, measured, _at_least(gain, ACCURACY_MARGIN))


def _unsupported(a: Row, b: Row, column: str) -> str:
    """A remark where the 95 % intervals do not tell two settings apart: the verdict is then one of chance."""
    return "" if differ(a, b, column) else " The 95 % intervals do not support a difference."
