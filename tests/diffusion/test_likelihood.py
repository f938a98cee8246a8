"""Likelihood of Gaussian data, where every term and the density itself are known, and against brute force."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from nrcg.diffusion.exact import mixture_predictor
from nrcg.diffusion.likelihood import (
    GREY,
    bound,
    flow_bits_per_dim,
    flow_log_density,
    grey_term,
    prior_term,
    steps_of,
    transition_term,
)
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.objectives import Prediction
from nrcg.diffusion.schedule import Schedule

MEAN, STD = 0.2, 0.3
SHAPE = (1, 2, 3)


def exact(schedule: Schedule):
    """E[eps | x_t] of data N(MEAN, STD^2) in each pixel."""

    def predict(x, t):
        abar = float(schedule.abar[t])
        return (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / (abar * STD**2 + 1 - abar)

    return predict


def grey(count: int, seed: int = 0) -> torch.Tensor:
    """Images of grey values, about N(MEAN, STD^2)."""
    x = MEAN + STD * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def test_the_prior_term_by_the_divergence_of_gaussians():
    schedule, x0 = Schedule.linear(5, 0.05, 0.5), grey(3)
    abar = schedule.abar[-1]
    expected = kl_divergence(Normal(abar.sqrt() * x0, (1 - abar).sqrt()), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(prior_term(schedule, x0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_by_brute_force(variance):
    """Each term by torch's own divergences, the first by the mass of each grey value, in float64."""
    schedule, x0, samples = Schedule.linear(7, 0.02, 0.5), grey(4), [3, 4, 5, 9]
    share = 0.3

    def predict(x, t):
        eps = exact(schedule)(x, t) + 0.1 * t
        return Prediction(eps, torch.full_like(x, share)) if variance == "learned_range" else eps

    found = bound(predict, schedule, x0, samples, seed=2, variance=variance)
    total = prior_term(schedule, x0)
    for t in range(1, 8):
        x_t = schedule.q_sample(x0, t, sample_noise(2, samples, t, SHAPE).double())
        x0hat = schedule.pred_x0(x_t, exact(schedule)(x_t, t) + 0.1 * t, t)
        large, small = (1 - float(schedule.abar[t] / schedule.abar[t - 1])), schedule.posterior(max(t, 2))[2]
        spread = {"fixed_small": small, "fixed_large": large, "learned_range": small ** (1 - share) * large**share}
        deviation = spread[variance] ** 0.5
        a, b, true = schedule.posterior(t)
        if t == 1:
            model = Normal(x0hat, deviation)
            mass = model.cdf(x0 + GREY / 2) - model.cdf(x0 - GREY / 2)
            term = -mass.log().flatten(1).sum(dim=1)
        else:
            model = Normal(a * x0hat + b * x_t, deviation)
            term = kl_divergence(Normal(a * x0 + b * x_t, true**0.5), model).flatten(1).sum(dim=1)
        # The sampler's noise is float32.
        torch.testing.assert_close(found.terms[:, t - 1], term, rtol=1e-5, atol=1e-6)
        total = total + term
    torch.testing.assert_close(found.nats, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.bits_per_dim, total / (6 * math.log(2)), rtol=1e-5, atol=1e-5)


def test_terms_of_the_exact_denoiser_have_their_closed_form():
    """E L_{t-1} = (SNR(t-1) - SNR(t)) / 2 * D * posterior variance of x_0 given x_t; 4 standard errors."""
    schedule, count = Schedule.linear(10, 0.01, 0.4), 3000
    x0 = MEAN + STD * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = bound(exact(schedule), schedule, x0, range(count), continuous=True)
    snr = schedule.abar / (1 - schedule.abar)
    for t in range(2, 11):
        abar = schedule.abar[t]
        left = STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)
        expected, terms = 6 * 0.5 * (snr[t - 1] - snr[t]) * left, found.terms[:, t - 1]
        assert abs(terms.mean() - expected) < 4 * terms.std() / count**0.5
        assert found.mse_x0[:, t].mean().item() == pytest.approx(left.item(), rel=0.05)
        assert found.mse_eps[:, t].mean().item() == pytest.approx((left * snr[t]).item(), rel=0.05)


def test_the_masses_of_all_grey_values_add_up_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.1, 0.02), (-1.2, 0.3), (0.999, 0.001), (0.0, 3.0)):
        x0 = levels.reshape(-1, 1, 1, 1)
        nats = grey_term(x0, torch.full_like(x0, mean), 2 * math.log(deviation))
        assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-9)
    far = grey_term(torch.ones(1, 1, 1, 1).double() * levels[200], torch.zeros(1, 1, 1, 1), 2 * math.log(0.01))
    assert 1000 < far.item() < math.inf  # a mass of 1e-700, which no difference of two numbers near 1 holds


def test_stratified_steps_estimate_the_sum_without_bias():
    schedule, x0 = Schedule.linear(30, 0.01, 0.3), grey(400)
    whole = bound(exact(schedule), schedule, x0, range(400))
    some = bound(exact(schedule), schedule, x0, range(400), num_steps=4)
    difference = some.nats - whole.nats
    assert abs(difference.mean()) < 4 * difference.std() / 20
    assert difference.std() > 0 and some.terms.isfinite().sum(dim=1).max() <= 6
    torch.testing.assert_close(some.terms[:, [0, -1]], whole.terms[:, [0, -1]])


def test_every_step_is_as_likely():
    chosen = torch.tensor(steps_of(11, 3, 0, range(6000)))
    assert chosen.shape == (6000, 3) and bool((chosen.diff(dim=1) >= 0).all())
    counts = torch.bincount(chosen.flatten(), minlength=12)[2:]
    assert len(counts) == 10 and (counts - 1800).abs().max() < 5 * 1800**0.5
    assert steps_of(5, None, 0, range(2)) == [[2, 3, 4, 5]] * 2 == steps_of(5, 9, 0, range(2))


def test_what_is_drawn_depends_on_the_image_alone():
    schedule, x0 = Schedule.linear(20, 0.01, 0.3), grey(6)
    whole = bound(exact(schedule), schedule, x0, range(6), num_steps=3)
    part = bound(exact(schedule), schedule, x0[4:], [4, 5], num_steps=3)
    torch.testing.assert_close(part.nats, whole.nats[4:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("exactly", [True, False])
def test_the_flow_has_the_density_of_the_data(exactly):
    """x_1 is Gaussian; Heun's error falls with the square of the step. Signs see a diagonal Jacobian exactly."""
    x = MEAN + STD * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = []
    for num_steps in (100, 200):
        schedule = Schedule.linear(num_steps, 0.1 / num_steps, 20 / num_steps)
        trace = None if exactly else sample_noise(0, range(4), 1, SHAPE).sign().double()[None]
        found = flow_log_density(exact(schedule), schedule, x, trace=trace)
        abar = float(schedule.abar[1])
        expected = Normal(abar**0.5 * MEAN, (abar * STD**2 + 1 - abar) ** 0.5).log_prob(x).flatten(1).sum(dim=1)
        errors.append((found - expected).abs().max().item())
    assert errors[1] < errors[0] / 3 and errors[1] < 0.02


def test_bits_of_the_flow_are_about_those_of_the_grey_values():
    """-log2 of the mass of a grey value, about the density times the distance of two."""
    schedule = Schedule.linear(400, 1e-4, 0.05)
    x0 = grey(300, seed=3)
    found = flow_bits_per_dim(exact(schedule), schedule, x0, range(300))
    expected = -Normal(MEAN, STD).log_prob(x0).flatten(1).mean(dim=1) / math.log(2) - math.log2(GREY)
    assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
    assert abs(found.mean() - expected.mean()) < 0.02


def test_learned_variances_must_be_said():
    schedule, x0 = Schedule.linear(4, 0.1, 0.4), grey(1)
    with pytest.raises(ValueError, match="variance 'learned_range' of a U-Net that says none; allowed: fixed_small"):
        transition_term(schedule, x0, x0, 2, Prediction(x0), "learned_range")


def test_the_bound_of_a_density_tends_to_it_as_one_over_t():
    """A mixture of Gaussians and the network that knows it: the gap to -log p, the same points and noise at each T."""
    means, std = torch.tensor([[-0.5, 0.2], [0.6, -0.1]], dtype=torch.float64), 0.2
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(2, (4000,), generator=generator)
    x = means[chosen] + std * torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    truth = -MixtureSameFamily(
        Categorical(torch.ones(2, dtype=torch.float64)), Independent(Normal(means, torch.full_like(means, std)), 1)
    ).log_prob(x)
    gaps, flows = [], []
    for num_steps in (25, 50, 100):
        schedule = Schedule.linear(num_steps, 0.1 / num_steps, 20 / num_steps)
        predict = mixture_predictor(means, std, schedule)
        x0 = x[..., None, None]
        found = bound(predict, schedule, x0, range(len(x)), variance="fixed_large", continuous=True)
        gaps.append((found.nats - truth).mean().item())
        flows.append((-flow_log_density(predict, schedule, x0) - truth).abs().mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
    # The error of the mean is 0.02 at most; a gap of order 1/T halves, one of order 1/T^2 would fall to a quarter.
    assert 1.5 < gaps[0] / gaps[1] < 3.0 and 1.5 < gaps[1] / gaps[2] < 3.0
    assert flows[0] > 2.5 * flows[1] > 6.25 * flows[2]


def test_images_outside_the_grey_values_are_refused():
    schedule, x0 = Schedule.linear(5, 0.05, 0.5), grey(2)
    with pytest.raises(ValueError, match=r"x0: holds values outside \[-1, 1\]"):
        bound(exact(schedule), schedule, x0 * 127.5 + 127.5, range(2))
