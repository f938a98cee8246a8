"""Compiled training is the training: the same weights, and it goes on after a kill. The compiler traces, on the CPU."""

import pytest
import torch
from training_job import CLASSIFIER, CPU, DDPM, SCHEDULE, SIZE, TRAIN, VAL

from nrcg.config import ClassifierConfig, DDPMConfig
from nrcg.diffusion import compiling
from nrcg.training.classifier import fit_classifier
from nrcg.training.ddpm import Hooks, train_unet
from nrcg.training.trainer import Checkpoint


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    graphs = []

    def backend(module, inputs, **settings):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return graphs


def train_ddpm(path, compile, on_step=lambda step: None):
    config = DDPMConfig(**DDPM | {"epochs": 1})
    return train_unet(
        config,
        TRAIN,
        VAL,
        image_size=SIZE,
        channels=3,
        device=CPU,
        precision=torch.float32,
        checkpoint=Checkpoint(path, "a", minutes=1e-9 if "killed" in path.name else 60),
        hooks=Hooks(on_step=on_step),
        compile=compile,
    )[0].state_dict()


def train_classifier(path, compile, on_step=lambda step: None):
    return fit_classifier(
        ClassifierConfig(**CLASSIFIER | {"epochs": 1}),
        SCHEDULE,
        TRAIN,
        VAL,
        num_classes=2,
        device=CPU,
        precision=torch.float32,
        checkpoint=Checkpoint(path, "a", minutes=1e-9 if "killed" in path.name else 60),
        compile=compile,
        on_step=on_step,
        on_epoch=lambda row: None,
    )[0].module.state_dict()


@pytest.mark.parametrize("train", [train_ddpm, train_classifier])
def test_a_compiled_training_gives_the_same_weights_also_after_a_kill(tmp_path, compiler, train):
    def killed(step):
        if step == 3:
            raise Killed

    plain = train(tmp_path / "plain.pt", "off")
    assert not compiler
    whole = train(tmp_path / "whole.pt", "on")
    assert compiler
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", "on", killed)
    resumed = train(tmp_path / "killed.pt", "on")
    assert plain.keys() == whole.keys()  # the names of the parameters stay
    for name in plain:
        # Traced in the same order, so that rounding is the same too.
        torch.testing.assert_close(whole[name], plain[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed[name], whole[name]), name
