"""The explaining guidance against distributions known by integration, and its limits."""

import math

import pytest
import torch
from torch import nn
from toys import (
    ClassOfTwoGaussians,
    LinearClassifier,
    SmoothCNN,
    TwoGaussians,
    log_prob,
    smooth_noise_predictor,
    vp_schedule,
)

from nrcg import EMA, ClassifierGuidance
from nrcg.diffusion.noise import sample_noise
from nrcg.explain.distances import PixelDistance, load_distance
from nrcg.explain.guidance import ExplanationGuidance
from nrcg.guidance.samplers import DDIM, DDPM, DPMSolverPP
from nrcg.guidance.sampling import guided_sample, start_samples

CPU = torch.device("cpu")
SAMPLERS = {
    "ddpm": lambda schedule: DDPM(schedule, False),
    "ddpm fixed_large": lambda schedule: DDPM(schedule, False, "fixed_large"),
    "ddim": lambda schedule: DDIM(schedule, False),
    "dpm++": lambda schedule: DPMSolverPP(schedule, False),
}


class LinearLogProb(nn.Module):
    """One logit w x - 50: log p(class 1 | x) is w x - 50, to e^-40 of itself."""

    def __init__(self, w: float):
        super().__init__()
        self.w = w

    def forward(self, x):
        return self.w * x.flatten(1) - 50.0


def explained(
    data, classifier, original, *, num_steps, num_samples=4000, sampler="ddpm", guidance=ExplanationGuidance, **settings
):
    """Samples (N,) of one pixel from noise, explained against one original."""
    schedule = data.schedule
    samples = range(num_samples)
    guide = guidance(
        classifier,
        torch.ones(num_samples, dtype=torch.int64),
        torch.full((num_samples, 1, 1, 1), original),
        clip_pred_x0=False,
        **settings,
    )
    x, nonfinite = guided_sample(
        start_samples(schedule, 3, samples, (1, 1, 1), CPU),
        data.predict_noise,
        SAMPLERS[sampler](schedule),
        range(num_steps, 0, -1),
        seed=3,
        samples=samples,
        guidance=guide,
    )
    assert not nonfinite.any()
    return x.flatten()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [50, 200])
def test_a_gaussian_with_a_linear_classifier_and_l2_is_exact(sampler, num_steps):
    """p(x | x*, y) of N(0, std^2) exp(w x) exp(-lambda (x - x*)^2) is a Gaussian: precision 1 / std^2 + 2 lambda, mean
    (w + 2 lambda x*) over it. The proximal step with the prior's own std is the mean of x_0 given x_t and x*; of the
    classifier nothing is left out where its gradient is shrunk by the prox, which is linear here."""
    schedule, std, w, weight, original = vp_schedule(num_steps), 0.4, 2.5, 3.0, -0.5
    data = TwoGaussians(schedule, 0.0, std)
    x = explained(
        data,
        LinearLogProb(w),
        original,
        num_steps=num_steps,
        sampler=sampler,
        distance=PixelDistance(2.0),
        weight=weight,
        prior_std=std,
        scale=1.0,
    )
    precision = 1 / std**2 + 2 * weight
    mean, spread = (w + 2 * weight * original) / precision, precision**-0.5
    # 7 / T for the discretisation, as without a distance, and three standard errors.
    tolerance = 7 / num_steps + 3 * spread / math.sqrt(len(x))
    assert float(x.mean()) == pytest.approx(mean, abs=tolerance)
    assert float(x.std()) == pytest.approx(spread, abs=tolerance)


class ExactlyNoiseAware(ExplanationGuidance):
    """Tells its classifier the step."""

    def gradient(self, x_t, t, predict_noise, schedule):
        self.classifier.t = t
        return super().gradient(x_t, t, predict_noise, schedule)


def integrated(log_density):
    """Mean, spread and share above 0 of a density by integration over [-3, 3]."""
    x = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    p = torch.softmax(log_density(x), dim=0)
    mean = float((p * x).sum())
    return mean, math.sqrt(float((p * (x - mean) ** 2).sum())), float(p[x > 0].sum())


@pytest.mark.parametrize("num_steps", [50, 200])
def test_without_a_distance_the_exact_classifier_gives_the_class(num_steps):
    """Two Gaussians and their noise-aware classifier: p(x) p(y | x) as integrated."""
    data = TwoGaussians(vp_schedule(num_steps), 0.6, 0.2)
    settings = {"distance": PixelDistance(2.0), "weight": 0.0, "scale": 1.0, "input": "x_t"}
    x = explained(data, ClassOfTwoGaussians(data), -0.6, num_steps=num_steps, guidance=ExactlyNoiseAware, **settings)

    def log_density(x):
        prior = torch.logaddexp(*(-((x - sign * 0.6) ** 2) / (2 * 0.2**2) for sign in (-1, 1)))
        return prior + nn.functional.logsigmoid(data.logit(x, 0))

    mean, spread, share = integrated(log_density)
    tolerance = 4 / num_steps + 3 * spread / math.sqrt(len(x))
    assert float(x.mean()) == pytest.approx(mean, abs=tolerance)
    assert float(x.std()) == pytest.approx(spread, abs=tolerance)
    assert float((x > 0).float().mean()) == pytest.approx(share, abs=tolerance)


class Logistic(nn.Module):
    """One logit w x."""

    def __init__(self, w: float):
        super().__init__()
        self.w = w

    def forward(self, x):
        return self.w * x.flatten(1)


@pytest.mark.parametrize("exponent, weight", [(2.0, 3.0), (1.0, 1.5)])
@pytest.mark.parametrize("num_steps", [50, 200])
def test_a_gaussian_with_a_logistic_classifier_is_near_the_integral(num_steps, exponent, weight):
    """What is not exact, and how much: the classifier is asked about x0hat instead of all x_0 that x_t may come from,
    and for L1 the proximal step is the mode where the mean is wanted. Of the mean 0.004 and of the spread 0.01 are lost
    whatever the steps (measured at T = 2000); the rest falls as 5 / T."""
    std, w, original = 0.4, 4.0, -0.5
    data = TwoGaussians(vp_schedule(num_steps), 0.0, std)
    settings = {"distance": PixelDistance(exponent), "weight": weight, "prior_std": std, "scale": 1.0}
    x = explained(data, Logistic(w), original, num_steps=num_steps, **settings)
    mean, spread, share = integrated(
        lambda x: -(x**2) / (2 * std**2) + nn.functional.logsigmoid(w * x) - weight * (x - original).abs() ** exponent
    )
    tolerance = 5 / num_steps + 3 * spread / math.sqrt(len(x)) + 0.01
    assert float(x.mean()) == pytest.approx(mean, abs=tolerance)
    assert float(x.std()) == pytest.approx(spread, abs=tolerance)
    assert float((x > 0).float().mean()) == pytest.approx(share, abs=2 * tolerance)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_large_weight_returns_the_image(sampler, exponent):
    """The implicit step tends to x* whatever the classifier wants, at the last step with no noise left."""
    data = TwoGaussians(vp_schedule(30), 0.6, 0.2)
    settings = {"distance": PixelDistance(exponent), "weight": 1e8, "scale": 50.0}
    x = explained(data, LinearLogProb(5.0), -0.4, num_steps=30, num_samples=20, sampler=sampler, **settings)
    # |prox - x*| is gap / lambda or less, and float32's rounding of the noise prediction.
    torch.testing.assert_close(x, torch.full_like(x, -0.4), rtol=0, atol=1e-4)


def test_an_explicit_step_never_overshoots(sampler="ddim"):
    """By its gradient a stiff term would oscillate without end: each step is cut to the distance from x*."""
    data = TwoGaussians(vp_schedule(50), 0.0, 0.4)
    found = []
    for weight in (1.0, 10.0, 1e2, 1e4, 1e8):
        x = explained(
            data,
            LinearLogProb(0.0),
            -0.5,
            num_steps=50,
            num_samples=50,
            sampler=sampler,
            distance=PixelDistance(2.0),
            weight=weight,
            pull="gradient",
            scale=1.0,
        )
        found.append(float((x + 0.5).abs().mean()))
    assert found[0] > found[1] > found[2] and max(found[3:]) < 0.1


def images(count=5, seed=0):
    return torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.8 - 0.9


def finite_differences(function, x, at, step=1e-6):
    """d function / dx at some places of each sample, by central differences."""
    found = torch.zeros(len(x), len(at))
    for column, place in enumerate(at):
        moved = []
        for sign in (1, -1):
            other = x.clone()
            other.view(len(x), -1)[:, place] += sign * step
            moved.append(function(other))
        found[:, column] = (moved[0] - moved[1]) / (2 * step)
    return found


@pytest.mark.parametrize("distance", ["l1", "l15", "l2"])
def test_both_gradients_go_through_the_denoised_image(distance):
    schedule, predict, t = vp_schedule(30), smooth_noise_predictor(), 7
    x, originals, classifier = images(seed=1), images(seed=2), SmoothCNN(3).double()
    guide = ExplanationGuidance(
        classifier,
        torch.tensor([0, 1, 2, 1, 0]),
        originals,
        distance=load_distance(distance),
        weight=2.0,
        pull="gradient",
        clip_pred_x0=False,
    )
    step = guide.gradient(x, t, predict, schedule)
    at = [0, 17, 50, 107]

    def seen(x):
        return schedule.pred_x0(x, predict(x, t), t)

    expected = finite_differences(lambda x: load_distance(distance)(seen(x), originals), x, at)
    torch.testing.assert_close(guide._away.flatten(1)[:, at].float(), expected, rtol=1e-3, atol=1e-6)
    for row, target in enumerate((0, 1, 2, 1, 0)):
        one = x[row : row + 1]
        expected = finite_differences(lambda x, target=target: log_prob(classifier, seen(x), target), one, at)
        torch.testing.assert_close(step.grad[row].flatten()[at].float(), expected[0], rtol=1e-3, atol=1e-6)


def walk(guidance, start, predict, num_steps=30):
    schedule = vp_schedule(num_steps)
    sampler = DDPM(schedule, True)
    samples = range(len(start))
    return guided_sample(start, predict, sampler, range(num_steps, 0, -1), seed=1, samples=samples, guidance=guidance)[
        0
    ]


def float_images(count=4, seed=0):
    return images(count, seed).float()


def predict_float(x, t):
    return torch.tanh(0.7 * x + 0.05 * t)


@pytest.mark.parametrize("changes", [{}, {"every_k": 3}, {"skip_above": 0.5}, {"grad_mode": "no_jacobian"}], ids=str)
def test_weight_zero_is_classifier_guidance_bit_for_bit(changes):
    start, classifier = sample_noise(0, range(4), 0, (3, 6, 6)), SmoothCNN(3)
    settings = {"scale": 3.0, "stabilizer": EMA(0.9)} | changes
    plain = walk(ClassifierGuidance(classifier, 1, **settings), start, predict_float)
    ours = ExplanationGuidance(classifier, torch.ones(4), float_images(), distance=PixelDistance(1.0), **settings)
    assert torch.equal(walk(ours, start, predict_float), plain)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pull": "gradient"},
        {"pull": "gradient", "joint": True, "stabilizer": EMA(0.9)},
        {"pull": "gradient", "normalize": True},
        {"robust": SmoothCNN(3, seed=5)},
        {"skip_above": 0.4},
        {"pull": "gradient", "skip_above": 0.4},
        {"every_k": 2},
    ],
    ids=str,
)
def test_each_sample_has_its_own_class_image_and_weight(changes):
    """A batch gives what its samples give alone: nothing couples them, with targets and weights of their own."""
    start, originals, classifier = sample_noise(0, range(4), 0, (3, 6, 6)), float_images(), SmoothCNN(3)
    targets, weights = torch.tensor([0, 2, 1, 2]), torch.tensor([5.0, 50.0, 500.0, 20.0])
    settings = {"distance": PixelDistance(2.0), "scale": 3.0} | changes
    whole = walk(ExplanationGuidance(classifier, targets, originals, weight=weights, **settings), start, predict_float)
    for row in range(4):
        place = slice(row, row + 1)
        guide = ExplanationGuidance(classifier, targets[place], originals[place], weight=weights[place], **settings)
        schedule = vp_schedule(30)
        alone, _ = guided_sample(
            start[place], predict_float, DDPM(schedule, True), range(30, 0, -1), seed=1, samples=[row], guidance=guide
        )
        # Convolutions of other batch sizes round otherwise.
        torch.testing.assert_close(whole[place], alone, rtol=0, atol=1e-3)


def test_normalised_gradients_are_scaled_by_the_mean():
    """g_update of DVCE: s times the unit gradient times norm2 of the posterior's mean."""
    schedule, t, x = vp_schedule(30), 16, float_images(seed=3)
    settings = {"distance": PixelDistance(1.0), "scale": 0.5, "normalize": True}
    guide = ExplanationGuidance(SmoothCNN(3), torch.ones(4), float_images(), **settings)
    prediction, shift = guide(x, t, predict_float, schedule)
    a, b, _ = schedule.posterior(t)
    mean = a * schedule.pred_x0(x, prediction.eps, t, clip=True) + b * x
    torch.testing.assert_close(shift.flatten(1).norm(dim=1), 0.5 * mean.flatten(1).norm(dim=1))


def test_a_joint_stabilizer_smooths_the_sum():
    """EMA is linear, so that joint and separate agree where no step is cut."""
    start, originals = sample_noise(0, range(4), 0, (3, 6, 6)), float_images()
    found = [
        walk(
            ExplanationGuidance(
                SmoothCNN(3),
                torch.ones(4),
                originals,
                distance=PixelDistance(2.0),
                weight=0.1,
                pull="gradient",
                scale=2.0,
                stabilizer=EMA(0.8),
                distance_stabilizer=EMA(0.8),
                joint=joint,
            ),
            start,
            predict_float,
        )
        for joint in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_mistakes_are_said():
    originals = float_images()
    cases = [
        ({"weight": -1.0}, "drives away"),
        ({"pull": "push"}, "pull: 'push' is unknown; allowed: proximal, gradient"),
        ({"cone_angle": 91.0}, r"cone_angle: 91.0 is not in \[0, 90\]"),
        ({"pull": "gradient", "weight": 1.0, "input": "x_t"}, "with input pred_x0"),
    ]
    for changes, words in cases:
        with pytest.raises(ValueError, match=words):
            ExplanationGuidance(SmoothCNN(3), torch.ones(4), originals, distance=PixelDistance(1.0), **changes)
    robust = ExplanationGuidance(
        LinearClassifier(torch.zeros(3, 108)),
        torch.ones(4),
        originals,
        distance=PixelDistance(1.0),
        robust=LinearClassifier(torch.zeros(2, 108)),
    )
    with pytest.raises(ValueError, match="robust: has 2 classes, the guide 3"):
        robust.check(originals)
