"""A full disk: one line that names the file, nothing that looks whole, and it goes on once there is room."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import toy_settings, write_balls, write_tiny_models

from nrcg.cli import main

ROOT = Path(__file__).parents[2]
CHANGES = {
    "ddpm": {"sample_every": 0},
    "classifiers": {"judge": {"checkpoint_minutes": 0.0001}},
    "sampling": {"start": "standard_normal"},
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of 3 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Data and untrained models of 16 x 16 and 8 x 8 pixels, on a disk with room."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_models(folder)
    write_balls(folder / "data", 40, 20)
    (folder / "toy.json").write_text(json.dumps(toy_settings(**CHANGES)))
    return folder


def fill(disk: Path, room: int) -> Path:
    """Fill the disk up to `room` bytes, a multiple of 4096."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            os.ftruncate(file.fileno(), max(file.tell() - room, 0))
    return filler


STEP = "--config {inputs}/toy.json --experiment toy"
# The command, and how many bytes are left where it writes.
VERBS = {
    "dataset": (f"dataset {STEP} --threads 1 --out {{out}}/data", 16384),
    "train_ddpm": (f"train-ddpm {STEP} --data {{inputs}}/data --threads 1 --out {{out}}/ddpm", 65536),
    "train_classifier, its checkpoint": (
        f"train-classifier {STEP} --role judge --data {{inputs}}/data --threads 1 --out {{out}}/judge",
        65536,
    ),
    "train_classifier, its weights": (
        f"train-classifier {STEP} --role robust --data {{inputs}}/data --threads 1 --out {{out}}/robust",
        65536,
    ),
    "forward": (
        f"forward {STEP} --data {{inputs}}/data --ddpm {{inputs}}/ddpm --classifiers {{inputs}}/classifiers"
        " --threads 1 --out {out}/forward.csv",
        0,
    ),
    "sample": (
        f"sample {STEP} --method unconditional --scale 0 --shard 0 --ddpm {{inputs}}/ddpm --threads 1"
        " --out {out}/shard0000.npy",
        0,
    ),
    "sample, its record": (
        f"sample {STEP} --method unconditional --scale 0 --shard 0 --ddpm {{inputs}}/ddpm --threads 1"
        " --out {out}/shard0000.npy",
        4096,
    ),
    "reference": (
        f"reference {STEP} --data {{inputs}}/data --classifiers {{inputs}}/classifiers --threads 1"
        " --cache {out}/cache --out {out}/reference.json",
        0,
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(verb, disk, inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NRCG_TRACKING", "off")
    text, room = VERBS[verb]
    out = disk / "out"
    out.mkdir()
    filler = fill(disk, room)
    command = text.format(inputs=inputs, out=out).split()
    try:
        assert main(command) == 1
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nrcg: ")]
        assert line.startswith(f"nrcg: {out}/")
        assert "No space left on device; free some space there and run it again" in line
        left = {path.name for path in out.rglob("*") if path.is_file() and path.stat().st_size}
        # Only a shard may lie there, which nobody takes without its record.
        assert left <= ({"shard0000.npy"} if verb == "sample, its record" else {"training.csv", "accuracy_over_t.csv"})
        filler.unlink()
        assert main(command) == 0
        assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".partial", ".pt"))]
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(out)
