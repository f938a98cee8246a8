"""The digits of scikit-learn as a data set."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nrcg.config import get_experiment, load, step_settings
from nrcg.data.arrays import open_split
from nrcg.data.digits import list_digits
from nrcg.errors import DataError
from nrcg.layout import DatasetPaths
from nrcg.pipeline.plan import image_counts
from nrcg.steps.dataset import make_dataset
from tests.toys import track_without_a_store


@pytest.fixture(scope="module")
def config():
    config = load("config.yaml")
    get_experiment(config, "digits").dataset.image_size = 8  # as they are
    return config


def test_every_digit_is_in_one_split_once(config, tmp_path, monkeypatch):
    track_without_a_store(monkeypatch, tmp_path)
    manifest = make_dataset(step_settings(config, "digits", "dataset"), out=tmp_path / "digits")
    splits = [open_split(tmp_path / "digits", split) for split in ("train", "val")]
    images, labels = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    assert (images[..., :1] == images).all()  # grey
    found = sorted((label, image.tobytes()) for label, image in zip(labels, images[..., 0], strict=True))
    pixels, digits = load_digits(return_X_y=True)
    levels = np.rint(pixels.reshape(-1, 8, 8) * 15.9375).astype(np.uint8)  # 16 grey levels up to 255
    assert found == sorted((digit, image.tobytes()) for digit, image in zip(digits, levels, strict=True))
    counts = image_counts(get_experiment(config, "digits").dataset, DatasetPaths("digits", tmp_path))
    made = manifest["splits"]
    assert (counts.train, counts.val) == (made["train"]["num_images"], made["val"]["num_images"]) == (1438, 359)
    assert made["val"]["class_counts"]["3"] == round(0.2 * 183)


def test_the_split_is_the_seeds():
    def order(seed):
        return list_digits(val_share=0.5, seed=seed).splits["val"].labels.tolist()

    assert order(1) == order(1) != order(2)


def test_without_scikit_learn_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        list_digits(val_share=0.2, seed=0)
