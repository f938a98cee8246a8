"""What the rules ask: files of an experiment, resources of its jobs, and what reading the workflow may do."""

import subprocess
from pathlib import Path

import pytest
from toys import toy_settings

from nrcg import config
from nrcg.errors import DataError
from nrcg.files import write_record
from nrcg.pipeline import resources, startup
from nrcg.pipeline.resources import JobResources
from nrcg.pipeline.targets import Targets

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole():
    return config.parse(toy_settings())


def test_targets_name_every_file_of_the_toy_experiment(whole):
    toy = Targets(whole, "toy")
    assert toy.shards("non_robust_x0_ema99") == [
        f"results/toy/samples/non_robust_x0_ema99/scale{scale}/shard{shard:04d}.npy"
        for scale in ("1", "2.5")
        for shard in (0, 1)
    ]
    results = toy.results()
    assert len(results) == len(set(results))
    assert {
        "data/toyballs/dataset.json",
        "data/toyballs/train/mean.npy",
        "models/toy/ddpm/unet/diffusion_pytorch_model.safetensors",
        "models/toy/classifiers/judge/accuracy_over_t.csv",
        "results/toy/samples/unconditional/scale0/shard0001.json",
        "results/toy/metrics/unconditional.csv",
        "results/toy/figures/stabilizers.svg",
        "results/toy/report.html",
    } <= set(results)


def test_the_last_shard_holds_the_rest_and_256_samples_are_shown(whole):
    toy = Targets(whole, "toy")  # 12 samples in shards of 8
    assert [toy.shard_size(0), toy.shard_size(1)] == [8, 4]
    assert len(toy.shown_shards()) == len([path for path in toy.samples() if path.endswith(".npy")])
    large = Targets(whole, "sportballs")  # shards of 1024: the first holds all that is shown
    assert len(large.shown_shards()) == sum(map(len, whole.experiments["sportballs"].sweep.values()))


def test_a_gpu_is_asked_for_where_the_device_says_so(whole, monkeypatch):
    monkeypatch.setattr(resources, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(resources, "count_nvidia_gpus", lambda: 4)
    here, cluster = JobResources(whole, "sportballs"), JobResources(whole, "sportballs", remote=True)
    assert (here.gpus, cluster.gpus) == (0, 1)
    assert JobResources(whole, "toy", remote=True).gpus == 0  # device: cpu
    assert (cluster.training_gpus, here.training_gpus) == (4, 0)
    assert JobResources(whole, "celebahq", remote=True).training_gpus == 1  # pretrained
    assert (here.feature_threads, cluster.feature_threads) == (1, 8)


def test_time_grows_with_pixels_steps_and_images(whole):
    cluster = JobResources(whole, "sportballs", remote=True)
    # 1024 samples x 400 steps x 1.25 ms, twice, and ten minutes to start.
    assert cluster.sample_minutes("robust") == 10 + round(2 * 1024 * 400 * 1.25e-3 / 60)
    assert cluster.forward_minutes() == 10 + round(2 * 3 * 2048 * 400 * 1.25e-3 / 60)
    assert cluster.guided_mb("sampling") == 6000
    cpu = JobResources(whole, "toy")  # 16 x 16 pixels, batches of 5
    assert cpu.guided_mb("sampling") == 2000 + round(5 * 160 / 16)


@pytest.mark.parametrize(
    ("arguments", "dry_run", "looks"),
    [
        (["snakemake", "quickstart", "--cores", "all"], False, False),
        (["snakemake", "-nq"], True, True),
        (["snakemake", "--lint"], False, True),
        (["snakemake", "--report=x.html"], False, True),
        (["snakemake", "--touch", "-F", "-c1"], False, False),
    ],
)
def test_a_look_at_the_workflow_is_told_from_a_run(arguments, dry_run, looks):
    assert startup.only_looks(arguments, dry_run) is looks


def test_a_look_changes_nothing_and_a_run_clears_up(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock = tmp_path / ".snakemake/locks/0.output.lock"
    shard = tmp_path / "results/toy/samples/unconditional/scale0/shard0000.npy"
    for path in (lock, shard):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    write_record(shard.with_suffix(".json"), {"sha256": "0" * 64})
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    startup.prepare(whole, only_looks=True)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    startup.prepare(whole, only_looks=False)
    assert not lock.exists() and not shard.exists() and shard.with_name("shard0000.npy.damaged").exists()


@pytest.mark.parametrize("only_looks", [True, False])
def test_damaged_data_stop_a_run_and_a_look(whole, tmp_path, monkeypatch, only_looks):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/toyballs").mkdir(parents=True)
    (tmp_path / "data/toyballs/dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"data/toyballs/dataset\.json: damaged"):
        startup.prepare(whole, only_looks=only_looks)


def test_no_trouble_of_the_tracking_store_stops_the_workflow(monkeypatch, capsys):
    """Neither one that cannot be reached, of which `nrcg track` says a line, nor one that takes too long."""

    def late(command: list[str], **how: object) -> None:
        assert how["check"] is False and command[-2:] == ["track", "--sync"]
        raise subprocess.TimeoutExpired(command, how["timeout"])

    monkeypatch.setattr(startup.tracking, "is_left_behind", lambda: True)
    monkeypatch.setattr(startup.subprocess, "run", late)
    startup.send_leftovers()
    assert capsys.readouterr().err == (
        "nrcg: warning: runs of before are not all sent yet; send them by: nrcg track --sync\n"
    )


def test_jobs_find_nrcg_of_this_environment_unless_software_is_deployed():
    assert startup.job_prefix(()).startswith('export PATH="') and startup.job_prefix(()).endswith("exec ")
    assert startup.job_prefix({"apptainer"}) == "export NRCG_WORKFLOW=$PPID; exec "
