"""The workflow's sampling through Slurm: the loopback Slurm of `loopback_slurm.py` and workflow/profiles/slurm.

Run on request, as root: `make test-slurm`. Needs Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import loopback_slurm
import numpy as np
import pytest
from workflow_runs import copy_tree, processes_in, rows_of

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="needs snakemake-executor-plugin-slurm: pip install -e .[slurm]",
    ),
    pytest.mark.skipif(
        bool(loopback_slurm.missing_programs()),
        reason=f"needs {', '.join(loopback_slurm.missing_programs())}: apt-get install slurmctld slurmd munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--configfile", "toy.yaml", "change.json"]
# No accounting database here; and a toy need not wait like a cluster.
HERE = [
    *("--profile", "workflow/profiles/slurm", "--slurm-no-account", "--slurm-status-command", "squeue"),
    *("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2", "--latency-wait", "5"),
]
METHOD = "non_robust_x0_ema99"
TABLE = f"metrics/{METHOD}.csv"
SHARDS = 8
# `auto`: on the loopback cluster a job asks for one of its two GPUs, and then finds that there is none.
TOY = {
    "device": "auto",
    "sampling": {"num_samples": 8, "shard_size": 1},
    "sweep": {"non_robust_x0_ema99": [1]},
}
# Differ between runs of the same job.
OWN = ("images_per_second", "peak_memory_mib", "mlflow_run_id")


def shard(number: int) -> str:
    return f"results/toy/samples/{METHOD}/scale1/shard{number:04d}.npy"


def samples(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.load(path) for path in sorted(folder.rglob("*.npy"))}


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with loopback_slurm.loopback_slurm(tmp_path_factory.mktemp("slurm"), cpus=8, memory=64000) as environment:
        yield environment | {"NRCG_TRACKING": "off"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The toy experiment, sampled and evaluated by the local executor; `local/` keeps that."""
    tree = copy_tree(tmp_path_factory.mktemp("cluster"))
    (tree / "change.json").write_text(json.dumps({"experiments": {"toy": TOY}}))
    words = [*SNAKEMAKE, "--cores", "2", f"results/toy/{TABLE}"]
    run = subprocess.run(words, cwd=tree, env=os.environ | {"NRCG_TRACKING": "off"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (tree / "results/toy").rename(tree / "local")
    return tree


def through_slurm(tree: Path, slurm: dict, *arguments: str) -> subprocess.CompletedProcess:
    words = [*SNAKEMAKE, *HERE, *arguments]
    return subprocess.run(words, cwd=tree, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def sampled(tree, slurm) -> Path:
    """The tree, sampled and evaluated once more, through Slurm."""
    run = through_slurm(tree, slurm, f"results/toy/{TABLE}")
    assert run.returncode == 0, run.stdout[-5000:]
    return tree


def test_the_samples_and_metrics_are_the_local_executors(sampled):
    local, cluster = samples(sampled / "local/samples"), samples(sampled / "results/toy/samples")
    assert len(local) == SHARDS
    assert list(cluster) == list(local)
    for name, images in local.items():
        np.testing.assert_array_equal(cluster[name], images, err_msg=name)
    rows = [rows_of(sampled / folder / TABLE) for folder in ("local", "results/toy")]
    for row in (*rows[0], *rows[1]):
        assert all(row.pop(name) is not None for name in OWN)
    assert rows[0] == rows[1]


def test_shards_share_jobs_which_ask_for_one_gpu_and_the_time_of_all(sampled, slurm):
    """Eight shards are a job of seven and a job of one, with ten minutes for each shard."""
    asked = Counter(
        (job["TimeLimit"], job["NumCPUs"], job["MinMemoryNode"], job["TresPerJob"], job["JobState"])
        for job in loopback_slurm.jobs(slurm)
        if job["Comment"].startswith("rule_toy_")  # the group's name
    )
    one = ("1", "6000M", "gres:gpu:1", "COMPLETED")
    assert asked == {("01:10:00", *one): 1, ("00:10:00", *one): 1}


def test_a_failed_job_is_reported_with_its_log(sampled, slurm):
    """A record without checksums: with damaged weights Snakemake would not start."""
    record = sampled / "models/toy/ddpm/training.json"
    whole = record.read_bytes()
    (sampled / shard(0)).unlink()
    record.write_text("{}")
    run = through_slurm(sampled, slurm, shard(0), "--retries", "0")
    record.write_bytes(whole)
    assert run.returncode == 1
    assert "nrcg: models/toy/ddpm/training.json: damaged" in run.stdout
    assert f"logs/toy/sample/{METHOD}_scale1_shard0000.log" in run.stdout
    assert not (sampled / shard(0)).exists()
    assert through_slurm(sampled, slurm, shard(0)).returncode == 0


def sampling(tree: Path) -> bool:
    return any("nrcg sample" in line for line in processes_in(tree))


def start(tree: Path, slurm: dict, number: int) -> subprocess.Popen:
    """Snakemake, as far as the job that makes a lost shard anew."""
    (tree / shard(number)).unlink()
    words = [*SNAKEMAKE, *HERE, shard(number), "--retries", "0"]
    run = subprocess.Popen(words, cwd=tree, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: sampling(tree))
    return run


def test_a_cancelled_job_leaves_no_process(sampled, slurm):
    run = start(sampled, slurm, 1)
    subprocess.run(["scancel", *loopback_slurm.queued(slurm)], env=slurm, check=True)
    out, _ = run.communicate()
    assert run.returncode == 1
    assert "CANCELLED" in out
    wait_until(lambda: processes_in(sampled) == [], seconds=15)
    assert not (sampled / shard(1)).exists()
    assert through_slurm(sampled, slurm, shard(1)).returncode == 0


def test_jobs_outlive_a_killed_snakemake_and_the_rerun_beside_them_is_right(sampled, slurm):
    """Slurm's jobs go on after kill -9. The rerun submits them once more; both write the same whole files."""
    run = start(sampled, slurm, 2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert len(loopback_slurm.queued(slurm)) == 1
    rerun = through_slurm(sampled, slurm, shard(2))
    assert rerun.returncode == 0, rerun.stdout[-3000:]
    wait_until(lambda: not loopback_slurm.queued(slurm))
    expected = np.load(sampled / "local" / Path(shard(2)).relative_to("results/toy"))
    np.testing.assert_array_equal(np.load(sampled / shard(2)), expected)
    assert not list((sampled / "results").rglob("*.tmp"))
    assert "Nothing to be done" in through_slurm(sampled, slurm, shard(2)).stdout
