"""Training by each objective: it learns, resumes, and the saved folder opens in diffusers with the same samples."""

import pytest
import torch
from diffusers import DDPMPipeline
from training_job import CPU, DDPM, SIZE, Killed, train_ddpm

from nrcg.config import TARGETS, DDPMConfig, ObjectiveConfig
from nrcg.diffusion.objectives import NATIVE
from nrcg.diffusion.unet import build_scheduler
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training import ddpm
from nrcg.training.timesteps import ENOUGH, ImportanceTimesteps
from nrcg.training.trainer import Checkpoint


def train(path, objective, on_step=lambda step: None, epochs=3, minutes=1e-9):
    config = DDPM | {"objective": objective, "epochs": epochs}
    return train_ddpm(Checkpoint(path, "a", minutes=minutes), config, on_step=on_step)


@pytest.mark.parametrize(
    "predicts",
    [pytest.param(one, marks=[] if one in ("v_prediction", "score") else pytest.mark.slow) for one in TARGETS],
)
def test_each_target_is_learned_and_opens_in_diffusers(tmp_path, predicts):
    unet, log = train(tmp_path / "a.pt", {"predicts": predicts, "weighting": "snr"}, epochs=8, minutes=60)
    assert log[-1]["val_loss"] < log[0]["val_loss"]  # of the noise, at the same t and noise
    scheduler = build_scheduler(DDPMConfig(**DDPM).schedule, NATIVE[predicts])
    ours = GuidedDDPMPipeline(unet, scheduler)
    ours.save_pretrained(tmp_path / "ddpm")
    theirs = DDPMPipeline.from_pretrained(tmp_path / "ddpm")
    theirs.set_progress_bar_config(disable=True)
    # One deterministic step of each: the last, which adds no noise.
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.scheduler.step(theirs.unet(x, 0).sample, 0, x).prev_sample
        prediction = ours.noise_predictor(torch.float32)(x, 1)
    found = ours.sampler().step(x, 1, 0, prediction, None, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_importance_draws_resume_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("nrcg.training.timesteps.ENOUGH", 1)
    objective = {"weighting": "vlb", "timesteps": "importance"}
    whole, log = train(tmp_path / "whole.pt", objective, minutes=60)

    def killed(step):
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", objective, killed)
    resumed, resumed_log = train(tmp_path / "killed.pt", objective)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [row["train_loss"] for row in resumed_log] == [row["train_loss"] for row in log]


def test_importance_draws_by_hand():
    """Losses 1, 2, 3 at t = 1, 2, 3: chances in that proportion, and an expectation that does not depend on them."""
    draws = ImportanceTimesteps(3, seed=0, device=CPU)
    torch.testing.assert_close(draws.chances(), torch.full((3,), 1 / 3))
    t = torch.tensor([1, 2, 3]).repeat_interleave(ENOUGH)
    draws.update(draws.sums(t, t.float()))
    chances = draws.chances()
    torch.testing.assert_close(chances, 0.999 * torch.tensor([1.0, 2.0, 3.0]) / 6 + 0.001 / 3)
    drawn, factors = draws.draw(step=4, count=20000)
    assert torch.equal(factors, 1 / (3 * chances[drawn - 1]))
    assert (torch.bincount(drawn, minlength=4)[1:] / 20000 - chances).abs().max() < 0.015  # 4 standard errors
    assert (factors * drawn.float()).mean().item() == pytest.approx(2, rel=0.02)
    assert torch.equal(draws.draw(4, 5)[0], draws.draw(4, 5)[0])
    # Another loss at t = 1: of the square, what ten draws do not remember is taken over.
    draws.update(draws.sums(torch.tensor([1]), torch.tensor([3.0])))
    torch.testing.assert_close(draws.moments, torch.tensor([0.9 * 1 + 0.1 * 9, 4.0, 9.0]))


def test_the_default_objective_is_the_simplified_one():
    assert ObjectiveConfig() == DDPMConfig(**DDPM).objective
    assert ddpm.Objective(ObjectiveConfig(), ddpm.Schedule.linear(4, 0.1, 0.2)).native == "epsilon"
