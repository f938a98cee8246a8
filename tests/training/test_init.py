"""A training that starts from somebody's weights."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from diffusers import UNet2DModel
from toys import TINY_SIZE, TINY_STEPS, toy_settings, write_balls, write_tiny_pipeline
from training_job import CLASSIFIER, CPU, DDPM, OPTIMIZER, SCHEDULE, Killed, bright_or_dark

from nrcg.classifiers.specs import load_classifier, with_new_head
from nrcg.classifiers.storage import save_classifier
from nrcg.cli import main
from nrcg.config import ClassifierConfig, DDPMConfig
from nrcg.errors import ConfigError
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training import ddpm
from nrcg.training.classifier import fit_classifier
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
    data = write_balls(tmp_path / "data", 12, 6, LARGER)
    schedule = {"num_train_timesteps": 9, "beta_start": 0.02, "beta_end": 0.7}
    optimizer = {"learning_rate": 1e-9, "warmup_steps": 0}
    settings = {"init": str(source), "schedule": schedule, "optimizer": optimizer}
    raw = toy_settings(dataset={"image_size": LARGER, "name": "balls"}, ddpm=settings)
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
        ({"prediction_type": "v_prediction"}, {}, {}, "predicts v_prediction, ddpm.objective.predicts needs epsilon"),
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


# --- Classifiers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path) -> str:
    """A SPEC of torchvision's ResNet-18 with weights of five classes in a file."""
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "w.pth")
    return f"torchvision:resnet18?weights={tmp_path}/w.pth&size=32"


@pytest.mark.parametrize("num_classes", [3, 5])
def test_only_the_last_layer_is_new(spec, num_classes):
    ours, theirs = with_new_head(spec, num_classes), load_classifier(spec)
    state, before = ours.module.state_dict(), theirs.module.state_dict()
    new = [name for name in before if not torch.equal(before[name], state[name])] if num_classes == 5 else None
    assert new in (None, ["fc.weight", "fc.bias"])
    kept = [name for name in before if not name.startswith("fc.")]
    assert all(torch.equal(before[name], state[name]) for name in kept) and len(state) == len(kept) + 2
    assert ours.count_classes() == num_classes and ours.settings() == theirs.settings()
    assert all(parameter.requires_grad for parameter in ours.module.parameters())


def test_a_classifier_is_trained_on_and_saved(tmp_path, spec, monkeypatch):
    """Its body moves little in a few steps at a small rate, and the folder gives the classifier again."""
    monkeypatch.setenv("NRCG_TRACKING", "off")
    images, checkpoint = bright_or_dark(20), Checkpoint(tmp_path / "checkpoint.pt", "a", minutes=60)
    settings = CLASSIFIER | {"init": spec, "epochs": 4, "optimizer": OPTIMIZER | {"learning_rate": 1e-3}}
    quiet = {"on_step": lambda done: None, "on_epoch": lambda row: None}
    trained, log = fit_classifier(
        ClassifierConfig(**settings),
        SCHEDULE,
        images,
        images,
        num_classes=2,
        device=CPU,
        precision=torch.float32,
        checkpoint=checkpoint,
        **quiet,
    )
    assert log[-1]["val_accuracy"] == 1.0
    begun = load_classifier(spec).module.conv1.weight
    assert 0 < (trained.module.conv1.weight - begun).norm() < 0.2 * begun.norm()
    save_classifier(tmp_path / "saved", trained.module, trained.record() | {"classes": ["dark", "bright"]})
    again, x = load_classifier(tmp_path / "saved"), torch.rand(4, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(again(x), trained(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["resnet18", "python:mine:make", "models/x"])
def test_other_sources_are_refused(source):
    with pytest.raises(ValueError, match=r"init: '.*' is neither torchvision:NAME nor timm:NAME"):
        ClassifierConfig(**CLASSIFIER, init=source)
