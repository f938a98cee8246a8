"""`nrcg likelihood`: bits per dimension of anybody's images under anybody's model, kept part by part."""

import json

import numpy as np
import pytest
import torch
from toys import TINY_SIZE, write_tiny_pipeline

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
        (("--data", "nowhere"), "nowhere: no such file or folder"),
        (("--ddpm", "images.npy"), "images.npy"),
    ],
)
def test_mistakes_are_one_line(here, capsys, flags, words):
    assert run(*flags) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
