"""bench/paper_size.py: one command that is run again until all is there."""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from nrcg import GuidedDDPMPipeline
from nrcg.csv_files import read_csv

ROOT = Path(__file__).parents[2]
NAMES = ("paper_size", "paper_size_run", "paper_size_stages", "paper_size_page")
FEW = {"unconditional": [0], "robust": [15], "non_robust": [15], "non_robust_x0_ema99": [15, 5]}
SPEED = {"images_per_second": 2.0, "peak_mib": 10.0, "share_of_peak": 0.1, "device": "cpu"}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The modules by their names; what they change of the process is given back."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("NRCG_TRACKING", "off")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield argparse.Namespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path[:] = path


def arguments(bench, *words: str) -> argparse.Namespace:
    return bench.paper_size.parse(["--out", "out", *words])


def begin(bench, *words: str):
    """A run as a call begins it."""
    return bench.paper_size_run.Run(arguments(bench, *words), time.monotonic() + 1000)


class Killed(BaseException):
    """Ends a call wherever it is, past everything that catches errors."""


def test_training_is_planned_to_fill_its_time(bench):
    plan, run = bench.paper_size_run.plan_training, bench.paper_size_run
    seconds = run.START_SECONDS + 200
    epochs, images = plan(1000, seconds, 80_000, 128)  # 0.85 x 200,000 images: more than two passes over all
    assert epochs == 3 and images % 128 == 0 and abs(run.MARGIN * 200_000 - epochs * images) <= 3 * 64
    assert plan(1e6, seconds, 256, 128)[1] == 256
    assert plan(0, 0, 80_000, 128) == (1, 128)


def test_scales_are_tried_in_turn(bench):
    assert bench.paper_size_run.in_turn({"a": [1, 2, 3], "b": [4], "c": [5, 6]}) == [
        *(("a", 1), ("b", 4), ("c", 5)),
        *(("a", 2), ("c", 6)),
        ("a", 3),
    ]


def test_settings_are_the_published_ones_but_for_what_is_stated(bench):
    run = begin(bench)
    run.state["plan"] = (3, 68_480)
    training, sampling = run.settings("train_ddpm", kind="train"), run.settings("sample", "non_robust_x0_ema99")
    assert training.ddpm.unet.block_out_channels == [64, 128, 192, 256] and training.ddpm.batch_size == 128
    assert training.ddpm.epochs == 3 and training.ddpm.schedule.num_train_timesteps == 400
    assert run.settings("dataset", kind="train").dataset.num_train == 68_480
    assert run.settings("dataset").dataset.num_train == 80_000
    assert sampling.guidance.sampler.steps is None and sampling.guidance.skip_above == 1.0
    fast = {name: run.settings("sample", name, "sweep").guidance for name in run.block()["sweep"]}
    assert {one.sampler.steps for one in fast.values()} == {0.5}
    assert {name for name, one in fast.items() if one.skip_above == 0.9} == {name for name in fast if "x0" in name}
    assert fast["non_robust_x0_ema99"].stabilizer == sampling.guidance.stabilizer
    assert run.settings("evaluate", "robust").evaluation.num_reference is None


def test_a_stage_begins_nothing_that_would_outlast_it(bench):
    run = begin(bench, "--toy", "--budget", "sweep=1")
    run.state |= {"pace": {"slow": 7.0, "slower": 7.0}, "spent": {"sweep": 30.0}}
    done = []

    def job(name: str, kind: str, amount: float = 1.0, needs: str | None = None, fails: bool = False):
        def work() -> None:
            done.append(name)
            if fails:
                raise ValueError("no such thing")
            (run.out / name).write_text("")

        return bench.paper_size_run.Job(run.out / name, work, kind, amount, run.out / needs if needs else None)

    jobs = [job("a", "slow", 4), job("b", "slower", 5), job("c", "new", needs="b"), job("d", "new", fails=True)]
    assert not run.do("sweep", jobs) and done == ["a", "d"]  # 28 of 30 seconds; 35
    assert run.state["failures"] == {"d": "ValueError: no such thing"}
    run.state["pace"]["slower"] = 1.0
    assert not run.do("sweep", jobs) and done == ["a", "d", "b", "c"]  # what failed waits for the next call
    assert json.loads(run.path.read_text())["spent"]["sweep"] >= 30.0


def test_verbs_side_by_side(bench):
    run = begin(bench, "--toy", "--beside")
    run.start("ends", ["--version"])
    run.wait("ends", 60)
    run.start("fails", ["validate", "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit, match=r"fails: exit code 1; (.|\n)*nowhere.yaml: no such config file"):
        run.wait("fails", 60)
    run.start("late", ["--version"])
    child = run.children["late"][0]
    with pytest.raises(bench.paper_size_run.OutOfTime):
        run.wait("late", 0)
    assert child.returncode is not None and not run.children


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_makes_nothing_twice(bench, monkeypatch):
    stages, sample, evaluate = bench.paper_size_stages, *map(bench.paper_size_stages._steps, ("sample", "evaluate"))
    few = {method: [] for method in bench.paper_size_run.TOY["sweep"]} | FEW
    monkeypatch.setitem(bench.paper_size_run.TOY, "sweep", few)
    monkeypatch.setattr(stages, "training_speed", lambda run, batch_size: 100.0)
    monkeypatch.setattr(stages.gpu, "run", lambda kind, variant, flags: SPEED)
    drawn, measured, draw, measure = [], [], sample.sample_shard, evaluate.evaluate_method

    def count_draws(settings, **others):
        if len(drawn) == 4 and not kills:
            kills.append(True)
            raise Killed
        drawn.append(others["out"])
        return draw(settings, **others)

    kills = []
    monkeypatch.setattr(sample, "sample_shard", count_draws)
    monkeypatch.setattr(
        evaluate,
        "evaluate_method",
        lambda *words, **others: (measured.append(others["out"]), measure(*words, **others)),
    )
    with pytest.raises(Killed):
        bench.paper_size.worker(begin(bench, "--toy"))
    os.chdir(bench_folder := Path.cwd().parents[1])
    weights = (bench_folder / "out/ddpm/training.json").read_bytes()
    assert "Left to do: sweep, best, forward, speed." in page(bench)

    run = begin(bench, "--toy")
    assert bench.paper_size.worker(run) == 0
    os.chdir(bench_folder)
    assert len(drawn) == len(set(drawn)) == 5 + 6 and len(measured) == len(set(measured)) == 5 + 3
    assert (run.ddpm / "training.json").read_bytes() == weights
    assert bench.paper_size.worker(begin(bench, "--toy")) == 0
    os.chdir(bench_folder)
    assert len(drawn) == 11
    check_outcome(bench, run)


def page(bench) -> str:
    bench.paper_size_page.write_page(begin(bench, "--toy"), 0)
    return Path("out/results.md").read_text()


def check_outcome(bench, run) -> None:
    """What a whole run leaves in its folder."""
    text = page(bench)
    assert "Left to do: nothing." in text and "Not measured yet" not in text
    for words in ("commit", "seeds | data 0, U-Net 0", "Judge accuracy of x0 + EMA 0.99", "| guidance | full | 2 |"):
        assert words in text
    for claim in (
        "It does so in less than a quarter of the steps.",
        "Guidance by the plain non-robust classifier fails",
    ):
        assert claim in text
    assert {len(read_csv(run.tables / f"{name}.csv")) for name in ("sweep", "best")} == {5, 3}
    assert {row["num_samples"] for row in read_csv(run.tables / "best.csv")} == {16}
    shares = bench.paper_size_page.read_csv_of_shares(run.tables / "class_shares_16.csv")
    assert sum(row["share"] for row in shares) == pytest.approx(1.0)
    assert (run.out / "figures/cfid_vs_scale.png").exists() and (run.out / "speed.json").exists()
    assert json.loads((run.ddpm / "training.json").read_text())["exported"]["dtype"] == "bfloat16"
    assert "## Measured" in (run.ddpm / "README.md").read_text()
    assert GuidedDDPMPipeline.from_pretrained(run.ddpm).data_mean.shape == (3, 16, 16)


def test_a_call_ends_in_time_with_all_that_it_began(bench, monkeypatch, tmp_path):
    """A worker that does not end, and has begun something itself."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(bench.paper_size, "__file__", str(script))
    monkeypatch.setattr(bench.paper_size.signal, "signal", lambda *_: None)  # pytest's own stay
    words, began = ["--toy", "--minutes", "0.13"], time.monotonic()
    assert bench.paper_size.supervise(words, arguments(bench, *words)) == bench.paper_size.AGAIN
    assert time.monotonic() - began < 30
    stat = Path("/proc", Path("child").read_text(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")
    assert "Left to do: train, sweep, best, forward, speed." in Path("out/results.md").read_text()


def test_another_source_wants_another_folder(bench):
    begin(bench, "--toy").save()
    with pytest.raises(SystemExit, match="give another --out"):
        begin(bench)
