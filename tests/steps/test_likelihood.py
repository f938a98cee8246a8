"""`nrcg likelihood`: bits per dimension of anybody's images under anybody's model, kept part by part."""

import json

import numpy as np
import pytest
import torch
from toys import TINY_SIZE, toy_settings, write_balls, write_tiny_pipeline

from nrcg import cli
from nrcg.csv_files import read_csv
from nrcg.data.arrays import to_unit
from nrcg.diffusion.likelihood import bound
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.steps import likelihood


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_tiny_pipeline(tmp_path / "ddpm")
    images = np.random.default_rng(0).integers(0, 256, (7, TINY_SIZE, TINY_SIZE, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "features.npy", np.zeros((4, 9), np.float32))
    np.save(tmp_path / "wide.npy", np.full((2, TINY_SIZE, TINY_SIZE, 3), 300, np.int16))
    monkeypatch.chdir(tmp_path)
    return images


def run(*flags, out="out"):
    return cli.main(["likelihood", "--ddpm", "ddpm", "--data", "images.npy", "--out", out, *flags])


def test_the_tables_hold_the_librarys_numbers(here, tmp_path, capsys):
    assert run("--num-steps", "0", "--flow", "2", "--batch-size", "3") == 0
    pipe = GuidedDDPMPipeline.from_pretrained("ddpm")
    expected = bound(pipe.noise_predictor(torch.float32), pipe.schedule(), to_unit(here), range(7))
    record = json.loads((tmp_path / "out/likelihood.json").read_text())
    bits = expected.bits_per_dim
    mean, error = record["bits_per_dim"]
    assert mean == pytest.approx(bits.mean().item(), rel=1e-4) and error == pytest.approx(
        bits.std().item() / 7**0.5, rel=1e-3
    )
    assert record["flow_bits_per_dim"][0] > 0 and (record["num_images"], record["num_steps"]) == (7, None)
    by_t = read_csv("out/likelihood.csv")
    assert [row["t"] for row in by_t] == list(range(len(by_t)))
    # All terms were taken: they add up to the total.
    assert sum(row["bits_per_dim"] for row in by_t) == pytest.approx(mean, rel=1e-9)
    by_image = [row["bits_per_dim"] for row in read_csv("out/images.csv")]
    np.testing.assert_allclose(by_image, bits.numpy(), rtol=1e-4)
    assert "bound: " in capsys.readouterr().out


def test_a_killed_run_goes_on_and_other_settings_start_anew(here, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "PART", 3)
    assert run("--num-steps", "2") == 0
    whole = (tmp_path / "out/images.csv").read_bytes()
    done = []
    measure = likelihood._measure_part

    def counted(*arguments):
        done.append(arguments[3])
        return measure(*arguments)

    monkeypatch.setattr(likelihood, "_measure_part", counted)
    parts = sorted((tmp_path / "out/parts").iterdir())
    parts[1].write_bytes(parts[1].read_bytes()[:50])  # cut off
    assert run("--num-steps", "2") == 0
    assert done == [3] and (tmp_path / "out/images.csv").read_bytes() == whole
    assert run("--num-steps", "3") == 0
    assert done == [3, 0, 3, 6]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--image-size", "4"), "holds an image of 4 x 4 x 3, the model's are 8 x 8 x 3; --image-size resizes"),
        (("--data", "features.npy"), "features.npy: holds features, images are needed"),
        (("--data", "wide.npy"), "wide.npy: int16 of shape (2, 8, 8, 3); images must be uint8, 0 to 255"),
        (("--data", "nowhere"), "nowhere: no such file or folder"),
        (("--ddpm", "images.npy"), "images.npy"),
    ],
)
def test_mistakes_are_one_line(here, capsys, flags, words):
    assert run(*flags) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A data set of 12 validation images, a model, and an experiment that measures them in shards of 5."""
    folder = tmp_path_factory.mktemp("shards")
    write_tiny_pipeline(folder / "ddpm")
    write_balls(folder / "data", 8, 12, image_size=TINY_SIZE)
    block = {"num_images": 11, "num_steps": 2, "num_traces": 1, "shard_size": 5, "batch_size": 4, "seed": 3}
    raw = toy_settings(likelihood=block)
    (folder / "toy.yaml").write_text(json.dumps(raw))
    return folder


def shard(folder, number, out):
    flags = ["--config", str(folder / "toy.yaml"), "--experiment", "toy", "--shard", f"{number:04d}"]
    return cli.main(
        ["likelihood", *flags, "--data", str(folder / "data"), "--ddpm", str(folder / "ddpm"), "--out", out]
    )


def test_shards_give_the_numbers_of_one_run(workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("NRCG_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    shards = [f"shard{number:04d}.npz" for number in range(4)]
    assert [shard(workplace, number, out) for number, out in enumerate(shards)] == [0, 0, 0, 0]
    with np.load(shards[2]) as third, np.load(shards[3]) as past:
        assert (len(third["nats"]), len(past["nats"])) == (1, 0)  # num_images ends within the third
    flags = ["--config", str(workplace / "toy.yaml"), "--experiment", "toy", "--shards", *shards]
    assert cli.main(["likelihood-table", *flags, "--out", "joined"]) == 0
    images = str(workplace / "data/val/images.npy")
    same = ["--num-images", "11", "--num-steps", "2", "--flow", "1", "--seed", "3", "--out", "whole"]
    assert cli.main(["likelihood", "--ddpm", str(workplace / "ddpm"), "--data", images, *same]) == 0
    joined, whole = (read_csv(tmp_path / name / "images.csv") for name in ("joined", "whole"))
    for column in ("bits_per_dim", "flow_bits_per_dim"):
        np.testing.assert_allclose([row[column] for row in joined], [row[column] for row in whole], rtol=1e-5)
    assert (tmp_path / "joined/bits_per_dim.png").stat().st_size > 5000
    (tmp_path / shards[1]).write_bytes(b"PK")
    assert cli.main(["likelihood-table", *flags, "--out", "joined"]) == 1


def test_a_shard_needs_its_number_and_an_experiment_that_measures(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    same = ["--data", str(workplace / "data"), "--ddpm", str(workplace / "ddpm"), "--out", "a.npz"]
    assert cli.main(["likelihood", "--config", str(workplace / "toy.yaml"), *same]) == 1
    assert "--shard: missing" in capsys.readouterr().err
    (tmp_path / "none.yaml").write_text(json.dumps(toy_settings(likelihood=None, objectives=None)))
    assert cli.main(["likelihood", "--config", "none.yaml", "--experiment", "toy", "--shard", "0", *same]) == 1
    assert "experiments.toy.likelihood: null; it measures none" in capsys.readouterr().err
