"""What guidance aims at: each target's number and gradient by hand, and what it does to known data."""

import math

import pytest
import torch
from toys import TwoGaussians, vp_schedule

from nrcg import ClassifierGuidance
from nrcg.guidance.guidance import log_prob_gradient
from nrcg.guidance.samplers import DDIM
from nrcg.guidance.sampling import guided_sample, start_samples
from nrcg.guidance.targets import AnyOf, Probability, Score, Value, log_prob_of, parse, target_of

LOGITS = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.0, -3.0, 4.0, 1.0]], dtype=torch.float64)


def test_any_of_several_adds_their_probabilities():
    expected = torch.log_softmax(LOGITS, dim=1).exp()[:, [0, 2]].sum(dim=1).log()
    torch.testing.assert_close(AnyOf((0, 2))(LOGITS), expected, rtol=1e-12, atol=0)
    binary = torch.tensor([[0.3]], dtype=torch.float64)
    torch.testing.assert_close(AnyOf((1,))(binary), torch.nn.functional.logsigmoid(binary[:, 0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_probability_is_best_where_it_holds(p):
    """Zero there, with zero gradient; elsewhere half of the squared distance of log-odds over width^2."""
    target = Probability(1, p, width=2.0)
    odds = math.log(p / (1 - p))
    at = torch.tensor([[0.0, odds]], dtype=torch.float64, requires_grad=True)
    assert float(target(at)) == pytest.approx(0.0, abs=1e-15)
    (grad,) = torch.autograd.grad(target(at).sum(), at)
    assert float(grad.abs().max()) < 1e-12
    away = torch.tensor([[0.0, odds + 3.0]], dtype=torch.float64)
    assert float(target(away)) == pytest.approx(-(3.0**2) / (2 * 2.0**2), rel=1e-12)


def test_log_odds_are_those_against_all_other_classes():
    probabilities = LOGITS.softmax(dim=1)
    odds = (probabilities[:, 2] / (1 - probabilities[:, 2])).log()
    torch.testing.assert_close(Probability(2, 0.5)(LOGITS), -(odds**2) / 2, rtol=1e-10, atol=1e-12)


def test_a_value_and_a_score_read_their_output():
    torch.testing.assert_close(Value(1.0, 0.5, output=1)(LOGITS), -((LOGITS[:, 1] - 1.0) ** 2) / (2 * 0.25))
    assert torch.equal(Score(3)(LOGITS), LOGITS[:, 3])
    assert torch.equal(log_prob_of(LOGITS, Score(3)), LOGITS[:, 3])


def test_a_score_guides_by_its_own_gradient():
    """A module of one number an image: the gradient is that of the number, not of a log-probability."""

    class Darkness(torch.nn.Module):
        def forward(self, x):
            return -(x**2).flatten(1).sum(dim=1)

    x = torch.tensor([0.5, -1.0, 2.0, 0.0]).reshape(1, 1, 2, 2)
    grad, outputs = log_prob_gradient(Darkness(), Score(), x)
    torch.testing.assert_close(grad, -2 * x)
    assert outputs.shape == (1, 1)
    guidance = ClassifierGuidance(Darkness(), Score(), clip_pred_x0=False)
    guidance.check(x)


class Regression(torch.nn.Module):
    """f(x) = x of one pixel."""

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("value", [-0.3, 0.5])
def test_a_regressions_value_gives_the_posterior(value):
    """Data N(0, std^2) and an observation of x_0 with error width: p(x_0 | value) is Gaussian; its mean is
    value * std^2 / (std^2 + width^2), and guidance through x0hat is exact up to the spread of x_0 given x_t, which the
    published gradient neglects: with width 1 and std 0.4 that is less than the discretisation."""
    std, width, num_steps, samples = 0.4, 1.0, 200, range(4000)
    schedule = vp_schedule(num_steps)
    data = TwoGaussians(schedule, 0.0, std)
    x, _ = guided_sample(
        start_samples(schedule, 3, samples, (1, 1, 1), torch.device("cpu")),
        data.predict_noise,
        DDIM(schedule, False),
        range(num_steps, 0, -1),
        seed=3,
        samples=samples,
        guidance=ClassifierGuidance(Regression(), Value(value, width), clip_pred_x0=False),
    )
    expected = value * std**2 / (std**2 + width**2)
    assert float(x.mean()) == pytest.approx(expected, abs=0.02 + 3 * std / math.sqrt(len(samples)))
    assert float(x.std()) == pytest.approx(std * width / math.hypot(std, width), abs=0.03)


class Balls:
    classes = ("baseball", "basketball", "soccer")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("soccer", 2),
        (1, 1),
        (["baseball", 2], AnyOf((0, 2))),
        (Probability(0, 0.5), Probability(0, 0.5)),
    ],
)
def test_a_target_of_the_library(given, expected):
    assert target_of(Balls(), given) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("soccer", 2),
        ("1", 1),
        ("baseball|soccer", AnyOf((0, 2))),
        ("soccer=0.5", Probability(2, 0.5)),
        ("soccer=0.5,2", Probability(2, 0.5, 2.0)),
        ("value=-1.5", Value(-1.5)),
        ("value=3,0.5", Value(3.0, 0.5)),
        ("score", Score()),
    ],
)
def test_a_target_of_the_shell(text, expected):
    assert parse(text, Balls.classes) == expected


def test_a_class_of_just_that_name_comes_first():
    assert parse("score", ["value=1", "score"]) == 1
    assert parse("a|b", ["a", "a|b"]) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: parse("tennis", Balls.classes), "target 'tennis' is no class of the classifier; allowed: baseball"),
        (lambda: parse("soccer=much", Balls.classes), "target: 'soccer=much'; CLASS=P, or value=V"),
        (lambda: parse("soccer=1", Balls.classes), "target: the probability 1.0 is not inside (0, 1)"),
        (lambda: parse("cat", None), "target: 'cat': the classifier's classes have no names; give a number"),
        (lambda: AnyOf((1, 1)), "target: [1, 1] are not different classes"),
        (lambda: AnyOf((0, 1, 2)).check(3), "target: [0, 1, 2] are all of the classifier's 3 classes"),
        (lambda: AnyOf((0, 5)).check(3), "target: 5 is no class of the classifier, which has 3"),
        (lambda: Value(math.nan), "target: the value nan is not finite"),
        (lambda: Value(1.0, 0.0), "target: the width 0.0 is not a finite number above 0"),
        (lambda: Score(2).check(2), "target: output 2 is none of the 2"),
        (
            lambda: ClassifierGuidance(Regression(), Value(1.0), skip_above=0.9),
            "skip_above: Value is no probability; it goes with classes",
        ),
    ],
)
def test_what_is_no_target_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_several_classes_skip_what_is_sure():
    """skip_above reads the sum of their probabilities."""
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return torch.stack([8.0 + 0 * x.flatten(1).sum(1), x.flatten(1).sum(1), x.flatten(1).sum(1)], dim=1)

    schedule = vp_schedule(50)
    guidance = ClassifierGuidance(Watched(), [0, 1], skip_above=0.9)
    data = TwoGaussians(schedule, 0.0, 0.4)
    x = torch.zeros(2, 1, 1, 1)
    guidance(x, 50, data.predict_noise, schedule)
    _, shift = guidance(x, 49, data.predict_noise, schedule)
    assert float(shift.abs().max()) == 0.0
