"""Objectives: targets and weights against hand computations and against each other in float64."""

import math

import pytest
import torch

from nrcg.config import TARGETS, WEIGHTINGS, ObjectiveConfig
from nrcg.diffusion.objectives import NATIVE, Objective, loss_weights, target_of, to_eps, x0_factor, x0_weight
from nrcg.diffusion.schedule import Schedule

T = 6
SCHEDULE = Schedule.linear(T, 0.02, 0.4)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise, guess = (torch.randn(T, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    return x0, noise, guess, torch.arange(1, T + 1)


def of_x0(kind: str, x0hat, x_t, t):
    """What a network of a kind says, whose denoised image is x0hat: the target where x0hat were the image."""
    abar = SCHEDULE.at(t, x_t)
    return target_of(kind, x0hat, (x_t - abar.sqrt() * x0hat) / (1 - abar).sqrt(), t, SCHEDULE)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_error_of_x0_is_a_factor_times_that_of_the_target(kind):
    """Of any guess of x_0, said in the target's terms."""
    x0, noise, guess, t = batch()
    x_t = SCHEDULE.q_sample(x0, t, noise)
    error = (target_of(kind, x0, noise, t, SCHEDULE) - of_x0(kind, guess, x_t, t)).square().flatten(1).sum(dim=1)
    expected = (x0 - guess).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(x0_factor(kind, SCHEDULE)[1:] * error, expected, rtol=1e-10, atol=1e-10)


def test_targets_by_hand():
    """abar = 0.64: roots 0.8 and 0.6; one pixel of 0.5 with noise -1."""
    schedule = Schedule(torch.tensor([0.2, 0.2], dtype=torch.float64))
    x0, noise = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    x_t = 0.8 * 0.5 - 0.6
    mean = (0.8**0.5 * 0.2 / 0.36) * 0.5 + (0.8**0.5 * 0.2 / 0.36) * x_t  # a = b where the two betas are equal
    for kind, expected in {
        "sample": 0.5,
        "epsilon": -1.0,
        "v_prediction": -0.8 - 0.6 * 0.5,
        "score": 1 / 0.6,
        "mean": mean,
    }.items():
        assert target_of(kind, x0, noise, 2, schedule).item() == pytest.approx(expected), kind
    with pytest.raises(ValueError, match="predicts: 'noise' is unknown; allowed: epsilon, sample, v_prediction"):
        target_of("noise", x0, noise, 2, schedule)


@pytest.mark.parametrize("kind", TARGETS)
def test_native_outputs_give_eps_back(kind):
    x0, noise, _, t = batch()
    native = NATIVE[kind]
    x_t = SCHEDULE.q_sample(x0, t, noise)
    found = to_eps(target_of(native, x0, noise, t, SCHEDULE), x_t, t, SCHEDULE, native)
    torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
def test_with_a_weighting_all_targets_have_the_same_loss_of_the_same_denoised_image(weighting):
    """Up to the normalisation, whose factor is that of the weights."""
    x0, noise, guess, t = batch()
    x_t = SCHEDULE.q_sample(x0, t, noise)
    weight = x0_weight(ObjectiveConfig(weighting=weighting), SCHEDULE)
    expected = (weight[1:] * (x0 - guess).square().flatten(1).mean(dim=1)).tolist()
    for kind in TARGETS:
        config = ObjectiveConfig(predicts=kind, weighting=weighting)
        objective = Objective(config, SCHEDULE)
        losses = objective.losses(of_x0(objective.native, guess, x_t, t), x0, noise, t)
        ratio = losses / torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)  # weights are float32


def test_weights_by_hand():
    """abar = 0.8, 0.64: SNR = 4 and 16 / 9, before them without bound."""
    schedule = Schedule(torch.tensor([0.2, 0.2], dtype=torch.float64))
    first = 0.5 / (0.2 / 0.36 * 0.2)  # 1 / (2 Sigma_2)
    for weighting, settings, expected in (
        ("simple", {}, [4, 16 / 9]),  # of epsilon
        ("vlb", {}, [first, (4 - 16 / 9) / 2]),
        ("snr", {}, [4, 16 / 9]),
        ("min_snr", {"gamma": 3.0}, [3, 16 / 9]),
        ("min_snr", {}, [4, 16 / 9]),
        ("p2", {"gamma": 2.0, "k": 0.5}, [4 / 4.5**2, (16 / 9) / (16 / 9 + 0.5) ** 2]),
        ("truncated_snr", {}, [4, 16 / 9]),
    ):
        found = x0_weight(ObjectiveConfig(weighting=weighting, **settings), schedule).tolist()
        assert found == pytest.approx([0, *expected]), weighting
    dark = Schedule(torch.tensor([0.2, 0.8], dtype=torch.float64))  # abar = 0.16, SNR below 1
    assert x0_weight(ObjectiveConfig(weighting="truncated_snr"), dark).tolist() == pytest.approx([0, 4, 1])


def test_weights_have_mean_one_over_t():
    assert loss_weights(ObjectiveConfig(), SCHEDULE) is None  # Ho et al.: 1 throughout
    assert loss_weights(ObjectiveConfig(weighting="snr"), SCHEDULE) is None  # the same of epsilon
    assert loss_weights(ObjectiveConfig(predicts="v_prediction"), SCHEDULE) is None
    for kind in TARGETS:
        for weighting in WEIGHTINGS:
            weights = loss_weights(ObjectiveConfig(predicts=kind, weighting=weighting), SCHEDULE)
            if weights is not None:
                assert weights[1:].mean().item() == pytest.approx(1) and bool((weights[1:] > 0).all())


def test_the_loss_by_hand():
    x0, noise, guess, t = batch()
    plain = Objective(ObjectiveConfig(), SCHEDULE)
    assert plain.loss(guess, x0, noise, t).item() == pytest.approx((guess - noise).square().mean().item())
    weighted = Objective(ObjectiveConfig(predicts="score"), SCHEDULE)  # of the noise: 1 / (1 - abar)
    weight = 1 / (1 - SCHEDULE.abar[1:])
    expected = (weight / weight.mean() * (guess - noise).square().flatten(1).mean(dim=1)).mean()
    assert weighted.loss(guess, x0, noise, t).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_bounds_gradient_is_that_of_the_vlb_weighted_loss(kind):
    """norm2(mu_q - mu_theta)^2 / (2 Sigma_t), differentiated by autograd, for t in 2..T."""
    x0, noise, guess, t = batch()
    guess = guess.requires_grad_(True)
    x_t = SCHEDULE.q_sample(x0, t, noise)
    bound = 0.0
    for row in range(1, T):
        a, _, variance = SCHEDULE.posterior(row + 1)
        bound = bound + (a * (x0[row] - guess[row])).square().sum() / (2 * variance)
    (expected,) = torch.autograd.grad(bound, guess)
    weight = x0_weight(ObjectiveConfig(predicts=kind, weighting="vlb"), SCHEDULE)
    target = target_of(kind, x0, noise, t, SCHEDULE)
    errors = (of_x0(kind, guess, x_t, t) - target).square().flatten(1).sum(dim=1)
    (found,) = torch.autograd.grad((weight[t] * x0_factor(kind, SCHEDULE)[t] * errors)[1:].sum(), guess)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_settings_that_a_weighting_does_not_have_are_refused():
    for settings, words in (
        ({"gamma": 5.0}, "gamma: the weighting 'simple' has no such key; min_snr, p2 has"),
        ({"weighting": "min_snr", "k": 1.0}, "k: the weighting 'min_snr' has no such key; p2 has"),
    ):
        with pytest.raises(ValueError, match=words):
            ObjectiveConfig(**settings)
    assert math.isclose(ObjectiveConfig(weighting="min_snr").bound[0], 5)
