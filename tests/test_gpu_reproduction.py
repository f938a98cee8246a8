"""The reproduction on a lent GPU: its plans, what it carries from call to call, and one toy run over two machines."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_reproduction as gpu  # noqa: E402
from guidance_quality import chosen_scales  # noqa: E402

from nrcg import config  # noqa: E402


def test_epochs_fill_the_time_less_a_twentieth_and_the_start():
    seconds = gpu.START_UP_SECONDS + 400
    assert gpu.plan_epochs(4000, 80_000, seconds) == 19  # 0.95 * 4000 * 400 / 80000
    assert gpu.plan_epochs(4000, 80_000, 10) == 1


def test_a_sweep_draws_as_many_samples_as_fit():
    sweep = {"unconditional": [0], "robust": [1, 2], "non_robust_x0": [1, 2, 3]}
    # 6 settings start up in 18 s; 300 s are left for 3 full settings and 3 at a third: 10 * 300 / 4 = 750 -> 704.
    assert gpu.plan_sweep_samples(sweep, 10, 318) == 704
    assert gpu.plan_sweep_samples(sweep, None, 318) == 256
    assert gpu.plan_sweep_samples(sweep, 1000, 318) == 1024
    assert gpu.plan_sweep_samples(sweep, 0.01, 318) == 128


def test_the_middle_scales_of_all_methods_come_first():
    order = gpu.sweep_order({"a": [1, 5, 15, 25, 50], "b": [0]})
    assert order == [("a", 15), ("b", 0), ("a", 25), ("a", 5), ("a", 50), ("a", 1)]


def test_bins_hold_every_name_once_and_no_more_than_the_limit():
    sizes = {"a": 9, "b": 6, "c": 5, "d": 4, "e": 1}
    bins = gpu.pack_bins(sizes, 10)
    assert sorted(name for names in bins for name in names) == sorted(sizes)
    assert bins == [["a", "e"], ["b", "d"], ["c"]]
    with pytest.raises(ValueError, match="a: 11 bytes"):
        gpu.pack_bins({"a": 11}, 10)


@pytest.mark.parametrize(("times", "number", "expected"), [(1.0, None, [2, 4, 8]), (5.0, 1, [10]), (1.0, 2, [2, 4])])
def test_scales_of_the_savings(times, number, expected):
    assert chosen_scales((2, 4, 8), times, number) == expected


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def work(tmp_path) -> Path:
    """A work folder of a call that was cut off: one setting is evaluated, one has two shards of its samples."""
    work = tmp_path / "work"
    write(work / "state.json", b"{}")
    noise = np.random.default_rng(0).bytes
    for number in range(3):
        write(work / f"models/sportballs/ddpm/unet/{number}.safetensors", noise(400_000))
    write(work / "data/sportballs64/train/images.npy", noise(1_000_000))
    write(work / "results/sportballs/metrics/robust@5.csv")
    for setting in ("robust/scale5", "robust/scale15"):
        for shard in range(2):
            folder = work / "results/sportballs/samples" / setting
            write(folder / f"shard{shard}.npy", noise(300_000))
            write(folder / f"shard{shard}.json", b"{}")
    write(folder / "shard2.npy")  # its record is not there: not whole
    write(work / "results/sportballs/kept/robust/scale5/shard0.npy")
    return work


def test_what_is_packed_comes_back_on_a_bare_machine(work, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "VOLUME_BYTES", 900_000)
    packed = gpu.pack(work, tmp_path / "out")
    assert [path.name for path in packed] == ["state-1.zip", "state-2.zip", "state-3.zip"]
    assert max(path.stat().st_size for path in packed) <= 900_000
    assert gpu.unpack(tmp_path / "out", tmp_path / "bare") == 3 + 2 + 1 + 4
    for path in (tmp_path / "bare").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (work / path.relative_to(tmp_path / "bare")).read_bytes()
    samples = tmp_path / "bare/results/sportballs/samples"
    assert sorted(path.name for path in samples.iterdir()) == ["robust"]
    assert [path.name for path in (samples / "robust").iterdir()] == ["scale15"]
    assert not (tmp_path / "bare/data").exists()


def test_shards_that_do_not_fit_stay_behind_and_models_never(work, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CARRIED_BYTES", 1_600_000)
    gpu.pack(work, tmp_path / "out")
    gpu.unpack(tmp_path / "out", tmp_path / "bare")
    assert len(list((tmp_path / "bare").rglob("*.safetensors"))) == 3
    assert [path.name for path in (tmp_path / "bare").rglob("samples/*/*/*.npy")] == ["shard0.npy"]
    monkeypatch.setattr(gpu, "VOLUME_BYTES", 500_000)
    monkeypatch.setattr(gpu, "MAX_VOLUMES", 2)
    with pytest.raises(ValueError, match="too many to be carried"):
        gpu.pack(work, tmp_path / "out")


def test_an_older_larger_state_leaves_no_file_behind_and_names_stay_inside(work, tmp_path):
    out = tmp_path / "out"
    write(out / "state-7.zip")
    gpu.pack(work, out)
    assert [path.name for path in out.iterdir()] == ["state-1.zip"]
    with zipfile.ZipFile(out / "state-2.zip", "w") as archive:
        archive.writestr("../outside", "x")
    with pytest.raises(SystemExit, match="would lie outside"):
        gpu.unpack(out, tmp_path / "bare")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("toy", [False, True])
def test_the_settings_are_valid_and_the_plans_enter_them(tmp_path, toy):
    call = gpu.Call(tmp_path / "work", tmp_path / "out", 9, toy)
    call.state |= {"epochs": 17, "sweep_samples": 192}
    loaded = config.load(call.config()).experiments
    sweep, best = loaded[gpu.EXPERIMENT], loaded[gpu.BEST]
    assert sweep.ddpm.epochs == best.ddpm.epochs == 17
    assert (sweep.sampling.num_samples, sweep.sampling.shard_size) == (192, 192)
    assert best.sampling.num_samples == (20 if toy else 5120)
    assert set(gpu.COMPARED) <= {method for method, scales in sweep.sweep.items() if scales}
    if not toy:
        assert sweep.ddpm.unet == config.load(ROOT / "config.yaml").experiments["sportballs"].ddpm.unet
        assert all(sweep.sweep.values())


def one_call(work: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_reproduction.py"), "--toy", "--work", str(work)]
    return subprocess.run(
        [*command, "--out", str(out), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_run_over_two_machines(tmp_path):
    """The first machine makes data and models, the second gets its files alone and does the rest."""
    first = one_call(tmp_path / "a", tmp_path / "out", "--minutes", "7", "--stages", *gpu.STAGES[:5])
    assert first.returncode == 0, first.stdout
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "out").rename(tmp_path / "state")
    stages = ["dataset", "ddpm", "classifiers", "forward", "sweep", "best", "report"]
    flags = ["--minutes", "7", "--state", str(tmp_path / "state"), "--stages", *stages]
    second = one_call(tmp_path / "b", tmp_path / "out", *flags)
    assert second.returncode == 0, second.stdout
    results = tmp_path / "b" / "results"
    for name in ("metrics.csv", "forward.csv", "report.html", "figures/best_samples.png"):
        assert (results / gpu.EXPERIMENT / name).exists(), name
    assert (results / gpu.BEST / "best.csv").exists()
    calls = json.loads((tmp_path / "b" / "state.json").read_text())["calls"]
    assert len(calls) == 2
    assert calls[1]["stages"]["ddpm"] < 1  # it came from the first machine
    assert all(path.stat().st_size < 16 * 2**20 for path in (tmp_path / "out").iterdir())
