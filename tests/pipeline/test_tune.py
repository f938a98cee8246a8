"""The search for a scale on functions with a known optimum, and `nrcg tune` on tiny models."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from toys import TUNE, track_without_a_store, write_toy_experiment

from nrcg import config
from nrcg.cli import main
from nrcg.csv_files import read_csv
from nrcg.errors import ConfigError, DataError
from nrcg.pipeline import tune

ROOT = Path(__file__).parents[2]


class Toy:
    """A row as the evaluation gives it, with a minimum of cfd_toy at `optimum` on the logarithm of the scale."""

    def __init__(self, optimum: float, half_width: float = 1e-9, power: float = 2.0, nan_above: float = math.inf):
        self.optimum, self.half_width, self.power, self.nan_above = optimum, half_width, power, nan_above
        self.scales: list[float] = []

    def __call__(self, scale: float) -> dict:
        self.scales.append(scale)
        value = abs(math.log(scale / self.optimum)) ** self.power
        value = math.nan if scale > self.nan_above else value
        row = {"fd_toy": 1.0, "cfd_toy": value, "cfd_toy_lo": value - self.half_width}
        return row | {"cfd_toy_hi": value + self.half_width, "accuracy_judge": math.exp(-min(value, 50.0))}


def run(toy: Toy, budget: int, *, low=0.1, high=1000.0, best_by="cfid", journal="journal.csv", settings="a") -> list:
    return tune.search(toy, low=low, high=high, budget=budget, best_by=best_by, journal=journal, settings=settings)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- The search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimum", [0.13, 0.7, 3.3, 10.0, 47.0, 333.0, 900.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
def test_the_optimum_of_a_unimodal_function_is_found(optimum, power):
    """Five scales of a grid one decade apart, then sections to 0.618 of two decades each: 16 evaluations come to a
    bracket below a factor 1.1."""
    toy = Toy(optimum, power=power)
    rows = run(toy, 16)
    assert tune.best_row(rows, "cfid")["scale"] == pytest.approx(optimum, rel=0.06)
    assert len(toy.scales) == len(set(toy.scales)) <= 16


@pytest.mark.parametrize("budget", [1, 2, 4, 5, 6, 9])
def test_the_budget_is_kept_and_spans_the_range(budget):
    toy = Toy(20.0)
    rows = run(toy, budget)
    assert len(toy.scales) == len(rows) == budget
    assert set(toy.scales[:3]) == {0.1, 1000.0, 10.0} or budget < 3
    assert all(0.1 <= scale <= 1000 for scale in toy.scales)


def test_the_search_ends_before_the_budget_when_nothing_is_left_to_find():
    rows = run(Toy(20.0), 100)
    assert len(rows) < 20
    assert tune.best_row(rows, "cfid")["scale"] == pytest.approx(20.0, rel=0.05)


def test_the_highest_accuracy_is_found_as_well():
    assert tune.best_row(run(Toy(5.0), 16, best_by="accuracy_judge"), "accuracy_judge")["scale"] == pytest.approx(
        5.0, rel=0.06
    )


def test_scales_that_diverge_are_the_worst():
    rows = run(Toy(300.0, nan_above=50.0), 20)
    assert tune.best_row(rows, "cfid")["scale"] == pytest.approx(50.0, rel=0.06)
    with pytest.raises(DataError, match="cfd_toy is finite at none of the scales tried"):
        tune.best_row(run(Toy(1.0, nan_above=0.0), 3, journal="other.csv"), "cfid")


@pytest.mark.parametrize("killed_after", [1, 4, 5, 8])
def test_a_killed_search_goes_on_and_repeats_nothing(killed_after):
    whole = Toy(20.0)
    run(whole, 12, journal="whole.csv")

    class Killed(Toy):
        def __call__(self, scale):
            if len(self.scales) == killed_after:
                raise KeyboardInterrupt
            return super().__call__(scale)

    first, second = Killed(20.0), Toy(20.0)
    with pytest.raises(KeyboardInterrupt):
        run(first, 12)
    rows = run(second, 12)
    assert first.scales + second.scales == whole.scales
    assert [row["scale"] for row in rows] == whole.scales
    third = Toy(20.0)
    run(third, 12)
    assert third.scales == []


def test_rows_of_other_settings_are_kept_and_not_used():
    run(Toy(20.0), 6)
    other = Toy(2.0)
    rows = run(other, 7, settings="b")
    assert len(other.scales) == len(rows) == 7
    assert [row["settings"] for row in read_csv("journal.csv")] == ["a"] * 6 + ["b"] * 7


def test_scales_of_another_range_are_kept_and_not_used():
    run(Toy(5.0), 3, low=1, high=10)
    other = Toy(5.0)
    rows = run(other, 3, low=100, high=1000)
    assert len(other.scales) == len(rows) == 3
    assert min(row["scale"] for row in rows) >= 100


def test_a_damaged_journal_is_named():
    Path("journal.csv").write_text("settings,scale\na\n")
    with pytest.raises(DataError, match=r"journal.csv: line 2 has 1 of 2 fields; delete it to begin"):
        run(Toy(1.0), 3)


@pytest.mark.parametrize("low, high", [(0, 1), (2, 1), (1, 1)])
def test_an_impossible_range_is_refused(low, high):
    with pytest.raises(ConfigError, match="is no range; 0 < low < high is needed"):
        run(Toy(1.0), 3, low=low, high=high)


@pytest.mark.parametrize("scales, expected", [([1, 5, 50], (0.1, 500)), ([0], (0.1, 1000)), ([], (0.1, 1000))])
def test_the_range_follows_from_the_sweep(scales, expected):
    assert tune.scale_range(scales) == pytest.approx(expected)


@pytest.mark.parametrize(
    "toy, budget, expected",
    [
        (Toy(1e-3), 16, ["0.1 is the lowest scale tried; a better one may lie outside, see --low"]),
        (Toy(1e6), 16, ["1000 is the highest scale tried; a better one may lie outside, see --high"]),
        (Toy(20.0), 16, []),
        (Toy(20.0), 5, ["the budget ended with the best between 1 and 100"]),
        # log(100 / 10)^2 = 5.3: intervals that reach half as far overlap with those of the neighbours 1 and 100
        (Toy(10.0, half_width=4.0), 5, ["the 95 % intervals of cfd_toy do not tell 1, 100 from the best"]),
    ],
    ids=["low edge", "high edge", "inside", "budget", "overlap"],
)
def test_what_to_know_of_the_result(toy, budget, expected):
    found = tune.notes(run(toy, budget), "cfid", 0.1, 1000.0)
    assert len(found) >= len(expected)
    for note in expected:
        assert any(one.startswith(note) for one in found), found
    if toy.optimum == 20.0 and budget == 16:
        assert found == []


@pytest.mark.parametrize("best", [1e-5, 0.0523, 1.0, 37.5, 12345.0])
def test_the_block_is_valid_where_it_is_pasted(best):
    text = tune.yaml_block("quickstart", "robust", best)
    block = yaml.safe_load(text)
    scales = block["experiments"]["quickstart"]["sweep"]["robust"]
    assert scales == sorted(scales) and len(scales) == 5 and scales[2] == pytest.approx(best, rel=1e-3)
    raw = config.merge(config.read_yaml(ROOT / "config.yaml"), block)
    assert config.parse(raw).experiments["quickstart"].sweep["robust"] == scales
    last = text.splitlines()[-1].strip()  # alone, among the others of a sweep
    lines = (ROOT / "config.yaml").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("      robust: [5, 15]"))
    lines[at] = f"      {last}"
    assert config.parse(yaml.safe_load("\n".join(lines))).experiments["quickstart"].sweep["robust"] == scales


# --- The verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_experiment(tmp_path) -> Path:
    return write_toy_experiment(tmp_path)


def test_a_method_is_tuned_and_goes_on(toy_experiment, capsys):
    assert main([*TUNE, "--budget", "3"]) == 0
    said = capsys.readouterr().out
    assert "cfd_judge" in said and "best" in said and "sweep:" in said
    folder = toy_experiment / "results" / "toy" / "tune"
    with open(folder / "non_robust_x0_ema99.csv", newline="") as file:
        first = list(csv.DictReader(file))
    assert [float(row["scale"]) for row in first] == [0.1, 25.0, pytest.approx(1.581)]
    assert {row["num_samples"] for row in first} == {"8"}
    assert main([*TUNE, "--budget", "4"]) == 0
    with open(folder / "non_robust_x0_ema99.csv", newline="") as file:
        second = list(csv.DictReader(file))
    assert second[:3] == first and len(second) == 4
    assert main([*TUNE, "--budget", "1", "--num-samples", "9"]) == 0  # other settings: nothing of it is used
    with open(folder / "non_robust_x0_ema99.csv", newline="") as file:
        assert [row["num_samples"] for row in csv.DictReader(file)] == ["8"] * 4 + ["9"]
    block = yaml.safe_load((folder / "non_robust_x0_ema99.yaml").read_text())
    raw = config.merge(config.read_yaml("config.yaml"), block)
    assert len(config.parse(raw).experiments["toy"].sweep["non_robust_x0_ema99"]) == 5
    assert [path.name for path in folder.glob("*.npy")] == []


def test_each_scale_gets_the_samples_of_the_workflow(toy_experiment):
    """The row at a scale is that of the shard drawn at it: same seeds, same settings."""
    from nrcg.classifiers.logits import predict, target_share
    from nrcg.classifiers.storage import open_classifier

    assert main([*TUNE, "--budget", "1", "--low", "2.5"]) == 0
    models = toy_experiment / "models" / "toy"
    shard = ("--config", "config.yaml", "--experiment", "toy", "--method", "non_robust_x0_ema99", "--scale", "2.5")
    paths = ("--ddpm", models / "ddpm", "--classifier", models / "classifiers" / "non_robust", "--out", "s.npy")
    assert main(list(map(str, ("sample", *shard, "--shard", 0, *paths)))) == 0
    images = np.load("s.npy")
    (row,) = read_csv("results/toy/tune/non_robust_x0_ema99.csv")
    for name, role in (("judge", "judge"), ("guide", "non_robust")):
        classifier = open_classifier(models / "classifiers" / role)
        assert row[f"accuracy_{name}"] == target_share(predict(classifier, images), 0)


@pytest.mark.parametrize(
    "flags, remove, text",
    [
        (["--method", "unconditional"], None, "--method: nothing guides unconditional, so it has no scale"),
        (["--method", "nope"], None, "method 'nope' is unknown; allowed: "),
        (["--low", "5", "--high", "2"], None, "--low, --high: 5 to 2 is no range"),
        (["--num-samples", "5"], None, "--num-samples: 5; an evaluation needs 6 or more"),
        (["--out", "models"], None, "--out: models: is a folder; name a file"),
        (
            [],
            "models/toy/classifiers/judge",
            "models/toy/classifiers/judge/config.json: not there; restore it, or make",
        ),
        ([], "models/toy/ddpm", "models/toy/ddpm/model_index.json: not there; restore it, or train one"),
    ],
)
def test_a_mistake_is_one_line(toy_experiment, capsys, flags, remove, text):
    if remove is not None:
        shutil.rmtree(toy_experiment / remove)
    assert main([*TUNE, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nrcg: {text}")
    assert error.count("\n") == 1
    assert not (toy_experiment / "results").exists()


def test_one_tracked_run_has_a_step_for_each_scale(toy_experiment, monkeypatch):
    track_without_a_store(monkeypatch, toy_experiment)
    assert main([*TUNE, "--budget", "2"]) == 0
    (path,) = Path(".nrcg/tracking").glob("*.jsonl")
    start, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert (start["experiment"], start["name"]) == ("toy", "tune non_robust_x0_ema99")
    assert start["tags"]["nrcg.kind"] == "tune"
    steps = [(entry["step"], entry["values"]) for entry in entries if "cfd_judge" in entry.get("values", {})]
    assert [(step, values["scale"]) for step, values in steps] == [(0, 0.1), (1, 25.0)]
