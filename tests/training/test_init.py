"""A training that starts from somebody's U-Net."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from toys import TINY_SIZE, TINY_STEPS, write_tiny_pipeline
from training_job import CPU, DDPM, bright_or_dark

from nrcg import config
from nrcg.cli import main
from nrcg.config import DDPMConfig
from nrcg.data.sportballs import write_sportballs
from nrcg.errors import ConfigError
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training import ddpm
from nrcg.training.pretrained import open_init
from nrcg.training.trainer import Checkpoint

ROOT = Path(__file__).parents[2]
LARGER = 2 * TINY_SIZE


def weights(unet: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in unet.state_dict().values()])


def opened(folder: Path, image_size: int = TINY_SIZE, channels: int = 3) -> UNet2DModel:
    return open_init(str(folder), image_size=image_size, channels=channels)[0]


@pytest.fixture
def source(tmp_path) -> Path:
    return write_tiny_pipeline(tmp_path / "theirs", seed=3)


def test_the_verb_trains_on_at_another_resolution(tmp_path, source, monkeypatch):
    """With a learning rate of nearly nothing the result is what it started from, for images of the new size."""
    monkeypatch.setenv("NRCG_TRACKING", "off")
    data = tmp_path / "data"
    drawn = {"classes": ["baseball", "basketball", "soccer"], "diameter": (0.5, 0.9), "seed": 0, "workers": 1}
    write_sportballs(data, image_size=LARGER, num_train=12, num_val=6, **drawn)
    raw = config.merge(config.read_yaml(ROOT / "config.yaml"), config.read_yaml(ROOT / "tests/data/toy.yaml"))
    toy = raw["experiments"]["toy"]
    toy["dataset"] |= {"image_size": LARGER, "name": "balls"}
    toy["ddpm"] |= {"init": str(source), "schedule": {"num_train_timesteps": 9, "beta_start": 0.02, "beta_end": 0.7}}
    toy["ddpm"]["optimizer"] = {"learning_rate": 1e-9, "warmup_steps": 0}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw))
    step = ("--config", str(tmp_path / "toy.yaml"), "--experiment", "toy", "--data", str(data))
    assert main(["train-ddpm", *step, "--out", str(tmp_path / "ours"), "--threads", "1"]) == 0
    pipe = GuidedDDPMPipeline.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(weights(pipe.unet), weights(opened(source)), rtol=0, atol=1e-6)
    assert pipe.scheduler.config.num_train_timesteps == 9  # the configuration's schedule, not theirs of TINY_STEPS
    assert TINY_STEPS != 9
    assert pipe(num_samples=1, on_step=lambda done: None).samples.shape == (1, 3, LARGER, LARGER)
    assert json.loads((tmp_path / "ours" / "training.json").read_text())["init"]["source"] == str(source)


def test_a_killed_training_goes_on(tmp_path, source):
    class Killed(Exception): ...

    def train(name: str, stop: int | None = None) -> torch.nn.Module:
        def on_step(done: int) -> None:
            if done == stop:
                raise Killed

        images, checkpoint = bright_or_dark(40), Checkpoint(tmp_path / name, "a", minutes=1e-9)
        settings = {"image_size": TINY_SIZE, "channels": 3, "device": CPU, "precision": torch.float32}
        hooks, start = ddpm.Hooks(on_step=on_step), opened(source)
        return ddpm.train_unet(
            DDPMConfig(**DDPM), images, images, **settings, checkpoint=checkpoint, hooks=hooks, unet=start
        )[0]

    whole = weights(train("undisturbed"))
    with pytest.raises(Killed):
        train("killed", stop=7)
    assert torch.equal(weights(train("killed")), whole)
    assert not torch.allclose(whole, weights(opened(source)), atol=1e-3)  # it did train


@pytest.mark.parametrize(
    ("scheduler", "unet", "fit", "text"),
    [
        ({}, {}, {"channels": 1}, "has 3 channels, the data set 1"),
        ({}, {}, {"image_size": 9}, "halves images 1 times, dataset.image_size: 9 cannot be"),
        ({"prediction_type": "v_prediction"}, {}, {}, "predicts v_prediction, the training's objective is epsilon"),
        ({}, {"num_class_embeds": 3}, {}, "is conditional on a class"),
        ({}, {"out_channels": 6}, {}, "predicts a variance too"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, scheduler, unet, fit, text):
    folder = write_tiny_pipeline(tmp_path / "theirs", **scheduler)
    if unet:
        settings = json.loads((folder / "unet" / "config.json").read_text())
        UNet2DModel.from_config(settings | unet).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match=f"^ddpm.init: .*{text}") as caught:
        opened(folder, **fit)
    assert "\n" not in str(caught.value)


def test_init_and_pretrained_exclude_each_other():
    with pytest.raises(ValueError, match="init: starts a training, and pretrained takes its place"):
        DDPMConfig(**DDPM, init="a", pretrained="b")
