"""Successive halving over scale, interval and stabilizer: on known functions, and `nrcg tune --over` on tiny models."""

import json
import math

import pytest
import yaml
from toys import TUNE, write_toy_experiment

from nrcg import config
from nrcg.cli import main
from nrcg.config import MethodConfig
from nrcg.csv_files import read_csv
from nrcg.errors import ConfigError
from nrcg.pipeline import halving
from nrcg.pipeline.halving import Candidate, best_of, draw_candidates, plan, search_jointly

BASE = MethodConfig(classifier="non_robust")
ALL = ("scale", "interval", "stabilizer")
INFORMED = {"name": "interval", "low": 0.0, "high": 0.45}


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def drawn(count=40, **changes):
    settings = {"over": ALL, "low": 0.5, "high": 50.0, "informed": (0.0, 0.45)} | changes
    return draw_candidates(BASE, count, **settings)


def test_the_rungs_cost_the_budget():
    assert plan(12, 256, 6) == [(16, 64), (8, 128), (4, 256)]
    assert sum(count * samples for count, samples in plan(12, 256, 6)) == 12 * 256
    assert plan(3, 8, 6) == [(4, 6), (2, 6), (1, 8)]  # no fewer than an evaluation needs


def test_settings_differ_repeat_and_span_what_is_asked_for():
    tried = drawn()
    assert len({one.key() for one in tried}) == 40 and [one.key() for one in tried] == [one.key() for one in drawn()]
    assert tried[0] == Candidate(5.0, {}, {"name": "none"})  # the method's own, in the middle of the range
    assert {one.stabilizer["name"] for one in tried} == {"none", "ema", "adam"}
    assert any(one.schedule == INFORMED for one in tried) and any(not one.schedule for one in tried)
    for one in tried:
        ratio = halving.ADAM_RATIO if one.stabilizer["name"] == "adam" else 1.0
        assert 0.5 / 1.01 <= one.scale * ratio <= 50.0 * 1.01
        assert one.schedule.get("low", 0) < one.schedule.get("high", 1)


@pytest.mark.parametrize(
    "schedule",
    [{"name": "interval", "low": 0.1, "high": 0.7}, {"name": "snr", "gamma": 2.0}, {"name": "linear", "end": 0.5}],
)
def test_what_is_not_searched_stays_the_methods_own(schedule):
    settings = {"classifier": "robust", "stabilizer": {"name": "ema", "beta": 0.9}, "scale_schedule": schedule}
    base = MethodConfig.model_validate(settings)
    tried = draw_candidates(base, 9, over=("scale",), low=1.0, high=9.0, informed=None)
    assert len({one.scale for one in tried}) == 9
    assert all(one.method(base) == base for one in tried)


def test_a_method_of_adam_tells_its_scales_from_the_others():
    base = MethodConfig.model_validate({"classifier": "robust", "stabilizer": halving.STABILIZERS[3]})
    tried = draw_candidates(base, 40, over=ALL, low=0.01, high=1.0, informed=None)
    assert tried[0].scale == 0.1
    for one in tried:
        ratio = 1.0 if one.stabilizer["name"] == "adam" else halving.ADAM_RATIO
        assert 0.01 / 1.01 <= one.scale / ratio <= 1.01


def test_a_rung_of_no_more_samples_measures_nothing_again():
    toy = Toy()
    rows = run(toy, drawn(4), [(4, 6), (2, 6), (1, 8)])
    assert len(rows) == 7 and len(toy.asked) == 5


class Toy:
    """cfd_toy is lowest at scale 4 in the informed interval with an EMA; fewer samples are noisier, in a fixed way."""

    def __init__(self, half_width=1e-9):
        self.asked, self.half_width = [], half_width

    def __call__(self, one: Candidate, samples: int) -> dict:
        self.asked.append((one.key(), samples))
        value = math.log(one.scale / 4.0) ** 2 + 2 * (one.schedule != INFORMED) + 2 * (one.stabilizer["name"] != "ema")
        value += 3.0 * math.sin(len(one.key())) / samples
        row = {"fd_toy": 1.0, "cfd_toy": value, "accuracy_judge": 0.5, "coverage": one.scale / 100}
        return row | {"cfd_toy_lo": value - self.half_width, "cfd_toy_hi": value + self.half_width}


def run(toy, tried, rungs):
    return search_jointly(toy, tried, rungs, best_by="cfid", journal="journal.csv", settings="a")


def test_the_best_setting_survives():
    tried, rungs = drawn(64), plan(48, 256, 6)
    toy = Toy()
    rows = run(toy, tried, rungs)
    assert [samples for _, samples in toy.asked] == [64] * 64 + [128] * 32 + [256] * 16
    best, alike = best_of(rows, "cfid")
    expected = min(tried, key=lambda one: Toy()(one, 10**9)["cfd_toy"])
    assert best["setting"] == expected.key() and alike == []
    assert best["stabilizer"].startswith("ema") and best["schedule"] == "interval_0.0_0.45"


def test_among_settings_that_intervals_do_not_tell_apart_coverage_decides():
    rows = run(Toy(half_width=100.0), drawn(4), [(4, 64)])
    best, alike = best_of(rows, "cfid")
    assert len(alike) == 3
    assert best["coverage"] == max(row["coverage"] for row in rows)


def test_a_killed_search_goes_on():
    class Killed(Exception): ...

    def dies(one, samples, toy=Toy()):  # noqa: B008
        if len(toy.asked) == 5:
            raise Killed
        return toy(one, samples)

    tried, rungs = drawn(4), [(4, 16), (2, 32), (1, 64)]
    with pytest.raises(Killed):
        run(dies, tried, rungs)
    toy = Toy()
    rows = run(toy, tried, rungs)
    assert len(toy.asked) == 2 and len(rows) == 7
    again = Toy()
    assert run(again, tried, rungs) == read_csv("journal.csv") and again.asked == []


def test_a_name_that_cannot_be_searched_is_refused():
    with pytest.raises(ConfigError, match="--over: 'beta' is unknown; allowed: scale, interval, stabilizer"):
        halving.check_dimensions(["scale", "beta"])


def test_a_method_is_tuned_together(tmp_path, capsys):
    """The verb, from models to a block that config.yaml takes."""
    toy_experiment = write_toy_experiment(tmp_path)
    over = ("--over", "scale,interval,stabilizer")
    assert main([*TUNE, *over, "--budget", "2"]) == 1
    assert "--budget: 2; a search over scale, interval, stabilizer needs 3 or more" in capsys.readouterr().err
    assert main([*TUNE, *over, "--budget", "3"]) == 0
    said = capsys.readouterr().out
    assert "coverage" in said and "best" in said and "7 of 7: " in said
    folder = toy_experiment / "results" / "toy" / "tune"
    rows = read_csv(folder / "non_robust_x0_ema99_jointly.csv")
    assert [row["num_samples"] for row in rows] == [6.0] * 4 + [8.0]  # the second rung has no more samples
    block = yaml.safe_load((folder / "non_robust_x0_ema99_jointly.yaml").read_text())
    raw = config.merge(json.loads((toy_experiment / "config.yaml").read_text()), block)
    name = "non_robust_x0_ema99_tuned"
    parsed = config.parse(raw)
    assert len(parsed.experiments["toy"].sweep[name]) == 5 and parsed.methods[name].classifier == "non_robust"
