"""The number of shards changes neither the images nor the metrics; jobs keep to the threads that they are given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toys import toy_settings, write_balls, write_tiny_models
from workflow_runs import rows_of

from nrcg.cli import main

NUM_SAMPLES = 49
METHOD, SCALE = "non_robust_x0_ema99", "2"
OWN = ("images_per_second", "peak_memory_mib", "mlflow_run_id")  # of a run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `ddpm`, `classifiers` and `data`: 8 x 8 pixels, six steps, nothing trained."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder)
    write_balls(folder / "data", 60, 4)
    return folder


def sampled(models: Path, folder: Path, shard_size: int, num_shards: int) -> tuple[np.ndarray, dict]:
    """The samples of all shards, drawn and evaluated by the verbs, and their row of metrics."""
    sampling = {"num_samples": NUM_SAMPLES, "shard_size": shard_size, "batch_size": 16, "start": "standard_normal"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(toy_settings(sampling=sampling)))
    asked = ["--config", str(folder / "config.json"), "--experiment", "toy", "--method", METHOD]
    setting = folder / f"samples/{METHOD}/scale{SCALE}"
    paths = [setting / f"shard{shard:04d}.npy" for shard in range(num_shards)]
    for shard, path in enumerate(paths):
        words = ["--ddpm", str(models / "ddpm"), "--classifier", str(models / "classifiers/non_robust")]
        assert main(["sample", *asked, "--scale", SCALE, "--shard", str(shard), *words, "--out", str(path)]) == 0
    inputs = ["--data", str(models / "data"), "--classifiers", str(models / "classifiers")]
    inputs += ["--cache", str(folder / "cache")]
    assert main(["reference", *asked[:4], *inputs, "--out", str(folder / "reference.json")]) == 0
    words = [*inputs, "--samples", str(folder / "samples"), "--reference", str(folder / "reference.json")]
    words += ["--out", str(folder / "metrics.csv")]
    assert main(["evaluate", *asked, "--scales", SCALE, *words]) == 0
    (row,) = rows_of(folder / "metrics.csv")
    assert all(row.pop(name) is not None for name in OWN)
    return np.concatenate([np.load(path) for path in paths]), row


@pytest.fixture(scope="module")
def in_one_shard(models, tmp_path_factory) -> tuple[np.ndarray, dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRCG_TRACKING", "off")
        return sampled(models, tmp_path_factory.mktemp("one") / "run", NUM_SAMPLES, 1)


@pytest.mark.parametrize(("shard_size", "num_shards"), [(13, 4), pytest.param(1, 49, marks=pytest.mark.slow)])
def test_shards_change_neither_images_nor_metrics(models, in_one_shard, tmp_path, monkeypatch, shard_size, num_shards):
    """Other batches round otherwise in float32: one level of 255 on at most one value in a thousand."""
    monkeypatch.setenv("NRCG_TRACKING", "off")
    images, row = sampled(models, tmp_path / "run", shard_size, num_shards)
    expected_images, expected_row = in_one_shard
    assert images.shape == expected_images.shape == (NUM_SAMPLES, 8, 8, 3)
    assert len(np.unique(images.reshape(NUM_SAMPLES, -1), axis=0)) == NUM_SAMPLES
    difference = np.abs(images.astype(int) - expected_images)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
    assert row.keys() == expected_row.keys()
    for name, value in expected_row.items():
        try:
            number = float(value)
        except ValueError:
            assert row[name] == value
        else:
            assert float(row[name]) == pytest.approx(number, rel=1e-2, abs=1e-3, nan_ok=True), name


# `nrcg sample`, which says how many threads torch computes with, and how many more the process then has.
COUNT = """
import re, sys
from pathlib import Path
from nrcg.cli import main
from nrcg.cli.imports import lean_imports
with lean_imports():
    import nrcg.guidance.pipeline

def counted(self, *arguments, **keywords):
    import torch
    def threads():
        return int(re.search(r'Threads:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
    before = threads()
    torch.ones(500, 500) @ torch.ones(500, 500)
    torch.randn(400_000).sin()
    print('counted', torch.get_num_threads(), threads() - before, flush=True)
    return drawn(self, *arguments, **keywords)

drawn = nrcg.guidance.pipeline.GuidedDDPMPipeline.__call__
nrcg.guidance.pipeline.GuidedDDPMPipeline.__call__ = counted
for threads in ('1', '3'):
    assert main([*sys.argv[1:], '--out', 'out' + threads, '--threads', threads]) == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's /proc")
def test_a_job_computes_with_the_threads_that_it_is_given(models, tmp_path):
    words = ["sample", "--ddpm", str(models / "ddpm"), "--num-samples", "1", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-c", COUNT, *words],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if line.startswith("counted")] == ["counted 1 0", "counted 3 2"]
