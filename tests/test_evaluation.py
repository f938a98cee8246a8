"""Evaluation of samples: shards are joined and checked, and the target's share is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nrcg.classifiers import Classifier, SmallCNN
from nrcg.errors import DataError
from nrcg.evaluation import choose_extractor, read_samples, setting_folder, target_accuracy
from nrcg.features import JudgeExtractor
from nrcg.files import sha256_file

SHARD = 4


def write_shard(folder: Path, number: int, count: int = SHARD, **changes) -> Path:
    """A shard whose images hold their sample's number."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard{number:04d}.npy"
    first = number * SHARD
    images = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    np.save(path, images)
    record = {
        "first_sample": first,
        "nonfinite": number,
        "seconds": 2.0,
        "peak_memory_mib": 100.0 + number,
        "sha256": sha256_file(path),
    }
    path.with_suffix(".json").write_text(json.dumps(record | changes))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten samples in three shards, written last first."""
    for number in (2, 1, 0):
        write_shard(tmp_path, number, count=2 if number == 2 else SHARD)
    return tmp_path


def test_shards_are_joined_in_order(folder):
    samples = read_samples(folder, 10)
    assert samples.images.shape == (10, 2, 2, 3)
    assert samples.images.dtype == np.uint8
    assert samples.images[:, 0, 0, 0].tolist() == list(range(10))
    assert samples.nonfinite == 0 + 1 + 2
    assert samples.images_per_second == pytest.approx(10 / 6.0)
    assert samples.peak_memory_mib == 102.0


def test_shards_of_an_earlier_and_larger_run_are_not_read(folder):
    assert len(read_samples(folder, 8).images) == 8


def cut_off(folder: Path) -> None:
    path = folder / "shard0001.npy"
    path.write_bytes(path.read_bytes()[:-5])


def changed(folder: Path) -> None:
    np.save(folder / "shard0001.npy", np.zeros((SHARD, 2, 2, 3), np.uint8))


DAMAGES = {
    "checksum": (changed, "shard0001.npy: is not what its .json says"),
    "cut off": (cut_off, "shard0001.npy: damaged"),
    "empty": (lambda folder: (folder / "shard0001.npy").write_bytes(b""), "shard0001.npy: damaged"),
    "no record": (lambda folder: (folder / "shard0001.json").unlink(), "shard0001.npy: damaged or without its .json"),
    "broken record": (lambda folder: (folder / "shard0001.json").write_text("{"), "shard0001.npy: damaged"),
    "record of another kind": (lambda folder: (folder / "shard0001.json").write_text("[]"), "shard0001.npy: "),
    "record without a key": (lambda folder: (folder / "shard0001.json").write_text("{}"), "a key is missing"),
    "gap": (lambda folder: (folder / "shard0001.npy").unlink(), "its shards begin at samples [0, 8], expected [0, 4]"),
    "a short shard": (lambda folder: write_shard(folder, 1, count=3), "begin at samples [0, 4, 8], expected [0, 4, 7]"),
    "too few": (lambda folder: (folder / "shard0002.npy").unlink(), "hold 8 samples, expected 10"),
    "none": (lambda folder: [path.unlink() for path in folder.glob("*.npy")], "holds no shard*.npy; run: snakemake"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line_that_names_the_file(folder, damage):
    break_it, text = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(DataError) as caught:
        read_samples(folder, 10)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(("scale", "name"), [(10.0, "scale10"), (2.5, "scale2.5"), (0.0, "scale0")])
def test_setting_folder(scale, name):
    assert setting_folder(Path("samples"), "robust", scale) == Path("samples/robust") / name


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 0."""

    def __init__(self, one_logit: bool):
        super().__init__()
        self.one_logit = one_logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))[:, None]
        return mean if self.one_logit else torch.cat([-mean, mean], dim=1)


@pytest.mark.parametrize("one_logit", [False, True])
@pytest.mark.parametrize("count", [8, 600])
def test_target_accuracy_is_the_targets_share(one_logit, count):
    """A quarter of the images is bright; 600 images take three batches."""
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[::4] = 255
    classifier = Classifier(Brightness(one_logit))
    assert target_accuracy(classifier, images, 1, torch.device("cpu")) == 0.25
    assert target_accuracy(classifier, images, 0, torch.device("cpu")) == 0.75


@pytest.mark.parametrize("features", ["auto", "judge"])
def test_without_inceptions_weights_the_judges_features_serve(tmp_path, features):
    judge = Classifier(SmallCNN(3)).eval()
    extractor = choose_extractor(features, str(tmp_path), judge, torch.device("cpu"))
    assert isinstance(extractor, JudgeExtractor)


def test_inception_that_is_asked_for_and_missing_is_refused(tmp_path):
    with pytest.raises(DataError, match="inception"):
        choose_extractor("inception", str(tmp_path), Classifier(SmallCNN(3)), torch.device("cpu"))
