"""Compiled training is the training: the same weights, and it goes on after a kill. The compiler traces, on the CPU."""

import pytest
import torch
from training_job import DDPM, Killed, train_classifier, train_ddpm

from nrcg.diffusion import compiling
from nrcg.training.trainer import Checkpoint


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    graphs = []

    def backend(module, inputs, **settings):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    return graphs


def ddpm_weights(path, compile, on_step=lambda step: None):
    return train_ddpm(checkpoint(path), DDPM | {"epochs": 1}, compile=compile, on_step=on_step)[0].state_dict()


def classifier_weights(path, compile, on_step=lambda step: None):
    return train_classifier(checkpoint(path), on_step, compile=compile, epochs=1)[0].module.state_dict()


def checkpoint(path):
    """After each step of a training that is killed."""
    return Checkpoint(path, "a", minutes=1e-9 if "killed" in path.name else 60)


@pytest.mark.parametrize("train", [pytest.param(ddpm_weights, marks=pytest.mark.slow), classifier_weights])
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
