"""Pictures of a diffusion model in training, with whatever classifier is there by then."""

import numpy as np
import pytest
import torch
from PIL import Image

from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.storage import save_classifier
from nrcg.config import get_experiment, load
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.steps.grids import EARLY_COLUMNS, PREVIEW_CLASSES, SHOWN_SIZE, Grids
from tests.toys import TINY_SIZE, write_tiny_pipeline

CELL = SHOWN_SIZE + 2
"""An image and the space to the next."""


@pytest.fixture
def drawn(tmp_path, capsys):
    """Draws early grids with some folders as classifiers; returns the rows of each picture and what was said."""
    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path / "ddpm"))
    mean = np.zeros((3, TINY_SIZE, TINY_SIZE), np.float32)
    grids = Grids(pipe.scheduler, get_experiment(load("config.yaml"), "quickstart").ddpm, mean, torch.float32)

    def draw(*preview):
        paths = grids.draw_early(pipe.unet, tmp_path / "ddpm.samples" / "epoch0002.png", preview)
        pictures = [np.asarray(Image.open(path)) for path in paths]
        assert {picture.shape[1] for picture in pictures} == {EARLY_COLUMNS * CELL + 2}
        said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(".png")]
        assert [line.rpartition(": ")[2] for line in said] == list(map(str, paths))
        return [np.split(picture[2:], len(picture) // CELL) for picture in pictures], said

    return draw


def test_without_a_classifier_samples_alone(drawn, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (rows,), _ = drawn(tmp_path / "missing", tmp_path / "damaged")
    assert len(rows) == EARLY_COLUMNS


def test_the_first_classifier_that_is_there_guides_to_each_class(drawn, tmp_path):
    torch.manual_seed(0)
    config = {"architecture": "small_cnn", "classes": list("abcd"), "image_size": TINY_SIZE}
    save_classifier(tmp_path / "robust", build_module("small_cnn", 4, 0.1), config)
    (unguided, guided), said = drawn(tmp_path / "missing", tmp_path / "robust")
    assert said[1].startswith("The same guided; its rows: unguided, a, b, c: ")
    assert len(guided) == 1 + PREVIEW_CLASSES
    np.testing.assert_array_equal(guided[0], unguided[0])  # the same seeds
    assert len({row.tobytes() for row in guided}) == len(guided)
