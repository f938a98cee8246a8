"""The guidance gradient against finite differences, and what it may and may not touch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toys import LinearClassifier, SmoothCNN, log_prob, smooth_noise_predictor, write_tiny_pipeline

from nrcg import EMA, Classifier, ClassifierGuidance, GuidedDDPMPipeline, Identity
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import log_prob_gradient
from nrcg.guidance.stabilizers import Stabilizer

SCHEDULE = Schedule.linear(20, 0.01, 0.2)
PREDICT = smooth_noise_predictor()


def images(batch: int = 2, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def central_differences(function, x: torch.Tensor, h: float = 1e-5) -> torch.Tensor:
    """The gradient of (B,) values of (B, C, H, W) images, pixel by pixel; its error is of order h^2 = 1e-10."""
    steps = h * torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    rows = [(function(image + steps) - function(image - steps)) / (2 * h) for image in x]
    return torch.stack(rows).reshape(x.shape)


# --- against finite differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 8, 20])
@pytest.mark.parametrize("num_classes, target", [(3, 2), (1, 0), (1, 1)])
@pytest.mark.parametrize("see", ["x_t", "pred_x0", "pred_x0 clipped"])
def test_gradient_equals_finite_differences(see, num_classes, target, t):
    """eqs. 4 and 6; through x0hat the gradient goes through the U-Net too."""
    classifier = SmoothCNN(num_classes).double()
    guidance = ClassifierGuidance(
        classifier, target, input=see.split()[0], clip_pred_x0=see.endswith("clipped"), stabilizer=None
    )
    x = images()

    def shown(x: torch.Tensor) -> torch.Tensor:
        if see == "x_t":
            return x
        abar = float(SCHEDULE.abar[t])
        x0hat = (x - (1 - abar) ** 0.5 * PREDICT(x, t)) / abar**0.5
        return x0hat.clamp(-1, 1) if guidance.clip_pred_x0 else x0hat

    step = guidance.gradient(x, t, PREDICT, SCHEDULE)
    expected = central_differences(lambda x: log_prob(classifier, shown(x), target), x)
    # All in float64; abar_t itself is a float32 of the schedule's, and the differences' own error is 1e-9.
    torch.testing.assert_close(step.grad, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    torch.testing.assert_close(step.prediction.eps, PREDICT(x, t))
    torch.testing.assert_close(step.logits, classifier(shown(x)), rtol=1e-6, atol=1e-6)
    assert not (step.grad.requires_grad or step.prediction.eps.requires_grad or step.logits.requires_grad)


def test_the_u_nets_jacobian_is_part_of_the_gradient():
    """With eps = c x the chain rule gives (1 - sqrt(1 - abar) c) / sqrt(abar), not 1 / sqrt(abar)."""
    t, c = 10, 0.7
    weight = torch.randn(1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 10
    guidance = ClassifierGuidance(LinearClassifier(weight), target=1, clip_pred_x0=False)
    x = images(1)
    abar = float(SCHEDULE.abar[t])
    jacobian = (1 - (1 - abar) ** 0.5 * c) / abar**0.5
    expected = (1 - torch.sigmoid(jacobian * x.flatten(1) @ weight.T)) * weight * jacobian
    step = guidance.gradient(x, t, lambda x, t: c * x, SCHEDULE)
    torch.testing.assert_close(step.grad.double().flatten(1), expected, rtol=1e-5, atol=0)  # float32


def test_x_t_needs_no_gradient_of_the_u_net():
    asked = []

    def predict_noise(x, t):
        asked.append(torch.is_grad_enabled() and x.requires_grad)
        return torch.zeros_like(x)

    for see in ("x_t", "pred_x0"):
        ClassifierGuidance(SmoothCNN(3).double(), 0, input=see).gradient(images(), 3, predict_noise, SCHEDULE)
    assert asked == [False, True]  # and one U-Net pass each


def test_gradient_works_under_no_grad():
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 0)
    expected = guidance.gradient(images(), 3, PREDICT, SCHEDULE).grad
    with torch.no_grad():
        assert torch.equal(guidance.gradient(images(), 3, PREDICT, SCHEDULE).grad, expected)


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_zeroes_the_gradient_of_saturated_pixels(clip):
    t = 5
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 0, clip_pred_x0=clip)
    x0hat = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    x0hat[0, :, 1, 2] = 1.5
    x0hat[0, :, 3, 3] = -1.01
    x_t = x0hat * float(SCHEDULE.abar[t]) ** 0.5
    step = guidance.gradient(x_t, t, lambda x, t: 0 * x, SCHEDULE)
    saturated = x0hat.abs() > 1
    assert (step.grad[~saturated] != 0).all()
    assert ((step.grad[saturated] == 0) == clip).all()


def test_log_prob_gradient_shows_the_image_itself_or_what_it_is_told():
    classifier, x = SmoothCNN(3).double(), images()
    plain, logits = log_prob_gradient(classifier, 1, x)
    same, same_logits = log_prob_gradient(classifier, 1, x, lambda x: x)
    # Through `see` the gradient is scaled and scaled back: rounding of float32.
    torch.testing.assert_close(same, plain, rtol=1e-6, atol=0)
    assert torch.equal(logits, same_logits)
    assert not x.requires_grad


def test_a_zero_gradient_stays_zero():
    grad, _ = log_prob_gradient(SmoothCNN(3).double(), 1, images(), lambda x: x.clamp(5, 6))
    assert torch.equal(grad, torch.zeros_like(grad))


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path_factory.mktemp("ddpm")))


@pytest.mark.parametrize("precision, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_small_gradients_survive_a_half_precision_u_net(pipe, precision, tolerance, size):
    """float16 ends at 6e-8: unscaled, a gradient of 1e-8 would lose the whole U-Net's Jacobian, a third of it."""
    weight = size * torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    guidance = ClassifierGuidance(LinearClassifier(weight), 0, clip_pred_x0=False)
    x = images(2, size=8).float()
    exact, half = (
        guidance.gradient(x, 4, pipe.noise_predictor(dtype), pipe.schedule()).grad
        for dtype in (torch.float32, precision)
    )
    # A few units of the last place: 1e-3 (float16) and 8e-3 (bfloat16), in the norm.
    assert float((half - exact).norm() / exact.norm()) < tolerance


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("see", ["x_t", "pred_x0"])
@pytest.mark.parametrize("intruder", [5.0, 1e30, float("nan"), float("inf")])
def test_a_samples_gradient_ignores_its_neighbours(see, intruder):
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 1, input=see)
    x = images(4)
    changed = x.clone()
    changed[2] = intruder
    before, after = (guidance.gradient(x, 6, PREDICT, SCHEDULE).grad for x in (x, changed))
    others = [0, 1, 3]
    # The convolution may sum in another order: rounding of float64, far below float32's.
    torch.testing.assert_close(after[others], before[others], rtol=1e-6, atol=0)
    assert not torch.equal(after[2], before[2])


def test_the_gradient_does_not_depend_on_the_batch():
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 1)
    x = images(5)
    together = guidance.gradient(x, 6, PREDICT, SCHEDULE).grad
    alone = torch.cat([guidance.gradient(x[i : i + 1], 6, PREDICT, SCHEDULE).grad for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=0)  # float32 of float64 sums


# --- the constructor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_above", [1.0, 0.01])
def test_the_classifier_is_frozen_while_it_guides_and_its_owner_gets_back_what_it_was(skip_above):
    """Also where its owner trains it on between two calls: statistics, modes and gradients stay the owner's."""
    classifier = SmoothCNN(3).train()
    classifier.head.eval().requires_grad_(False)
    statistics = classifier.norm.running_mean.clone()
    guidance = ClassifierGuidance(classifier, 0, skip_above=skip_above)
    x = images().float()
    found = [guidance(x, 3, lambda x, t: x, SCHEDULE)[1] for _ in range(2)][-1]
    assert guidance.classifier is classifier and classifier.training and classifier.norm.training
    assert not classifier.head.training and not classifier.head.weight.requires_grad
    assert classifier.conv.weight.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(classifier.norm.running_mean, statistics)
    classifier.eval()
    guidance.reset()
    alone = [guidance(x[:1], 3, lambda x, t: x, SCHEDULE)[1] for _ in range(2)][-1]
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-6)


def test_a_class_is_named_or_numbered_by_any_integer():
    named = Classifier(SmoothCNN(3), classes=["ball", "cat", "dog"])
    assert ClassifierGuidance(named, "cat").target == 1
    assert ClassifierGuidance(named, np.int64(2)).target == 2
    for classifier, target, words in (
        (named, "horse", "allowed: ball, cat, dog"),
        (SmoothCNN(3), "cat", "have no names; give a number"),
        (named, 0.9, "target: 0.9 is no whole number >= 0"),
        (named, True, "target: True is no whole number >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ClassifierGuidance(classifier, target)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_scale_is_refused_where_it_does(value):
    guidance = ClassifierGuidance(SmoothCNN(3), 0, scale=lambda left: value if left < 0.6 else 1.0)
    assert guidance.scale_at(6, Schedule.linear(10, 0.1, 0.2)) == 1.0
    with pytest.raises(ValueError, match=r"scale: the schedule gives .* at t / T = 0.5; a finite number >= 0"):
        guidance.scale_at(5, Schedule.linear(10, 0.1, 0.2))


def in_place(x):
    return SmoothCNN(3)(x.sub_(0.1).div_(2.0))


def test_a_function_that_normalises_in_place_guides_as_its_module_does():
    x = images().float()
    plain = ClassifierGuidance(lambda x: SmoothCNN(3)((x - 0.1) / 2.0), 1).gradient(x, 3, lambda x, t: x, SCHEDULE)
    before = x.clone()
    for kind in ("pred_x0", "x_t"):
        guidance = ClassifierGuidance(in_place, 1, input=kind)
        guidance.check(x)
        found = guidance.gradient(x, 3, lambda x, t: x, SCHEDULE)
        if kind == "pred_x0":
            torch.testing.assert_close(found.grad, plain.grad)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_classifier_of_another_floating_type_guides_and_the_gradient_stays_float32(dtype):
    x = images().float()
    exact = ClassifierGuidance(SmoothCNN(3), 1).gradient(x, 3, lambda x, t: x, SCHEDULE).grad
    guidance = ClassifierGuidance(SmoothCNN(3).to(dtype), 1)
    guidance.check(x)
    found = guidance.gradient(x, 3, lambda x, t: x, SCHEDULE).grad
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_guidance_works_in_the_callers_inference_mode():
    x = images().float()
    expected = ClassifierGuidance(SmoothCNN(3), 1).gradient(x, 3, lambda x, t: x, SCHEDULE).grad
    guidance = ClassifierGuidance(SmoothCNN(3), 1)
    with torch.inference_mode():
        found = guidance.gradient(x, 3, lambda x, t: x, SCHEDULE).grad
    torch.testing.assert_close(found, expected)


def test_defaults_are_the_papers_method():
    guidance = ClassifierGuidance(SmoothCNN(3), target=2, scale=10)
    assert (guidance.target, guidance.scale, guidance.input, guidance.clip_pred_x0) == (2, 10.0, "pred_x0", True)
    assert isinstance(guidance.stabilizer, Identity)
    assert ClassifierGuidance(SmoothCNN(3), 0, stabilizer=EMA(0.9)).stabilizer.beta == 0.9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"input": "x0"}, "input: 'x0' is unknown; allowed: pred_x0, x_t"),
        ({"scale": -1.0}, "scale: -1.0 is not a finite number >= 0"),
        ({"scale": float("nan")}, "scale: nan is not a finite number >= 0"),
        ({"scale": float("inf")}, "scale: inf is not a finite number >= 0"),
        ({"target": -1}, "target: -1 is no whole number >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        ClassifierGuidance(SmoothCNN(3), **{"target": 0} | settings)
    assert str(error.value) == message


# --- check -----------------------------------------------------------------------------------------------------------


class Gives(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    "classifier, target",
    [
        (SmoothCNN(3), 2),
        (SmoothCNN(1), 0),
        (SmoothCNN(1), 1),
        (Gives(SimpleNamespace(logits=torch.zeros(2, 4, requires_grad=True))), 3),
    ],
)
def test_a_classifier_that_fits_passes(classifier, target):
    ClassifierGuidance(classifier, target).check(torch.empty(5, 3, 8, 8))


@pytest.mark.parametrize(
    "classifier, target, error, message",
    [
        (SmoothCNN(3), 3, ValueError, "target: 3 is no class of the classifier, which has 3"),
        (SmoothCNN(1), 2, ValueError, "target: 2 is no class of the classifier, which has 2"),
        (SmoothCNN(3, channels=1), 0, ValueError, r"cannot take images of shape \(3, 8, 8\): "),
        (LinearClassifier(torch.zeros(2, 10)), 0, ValueError, r"cannot take images of shape \(3, 8, 8\): "),
        (Gives(torch.zeros(1, 3, 2, 2)), 0, ValueError, r"logits of shape \(1, 3, 2, 2\); expected \(B, K\)"),
        (Gives("cat"), 0, TypeError, r"gave str; expected logits \(B, K\)"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(classifier, target, error, message):
    with pytest.raises(error, match=message) as raised:
        ClassifierGuidance(classifier, target).check(torch.empty(2, 3, 8, 8))
    assert "\n" not in str(raised.value)


# --- how the gradient is taken ---------------------------------------------------------------------------------------


def test_no_jacobian_is_the_classifiers_gradient_at_the_denoised_image():
    """With eps a constant, x0hat = x_t / sqrt(abar) + ..., so the gradient is the classifier's over sqrt(abar)."""
    guidance = ClassifierGuidance(SmoothCNN(3).double(), 1, grad_mode="no_jacobian", clip_pred_x0=False)
    x, t = images(), 3
    step = guidance.gradient(x, t, PREDICT, SCHEDULE)
    x0 = SCHEDULE.pred_x0(x, PREDICT(x, t).detach(), t)
    expected, _ = log_prob_gradient(guidance.classifier, 1, x0)
    torch.testing.assert_close(step.grad, expected / math.sqrt(float(SCHEDULE.abar[t])), rtol=1e-4, atol=1e-7)
    full = ClassifierGuidance(guidance.classifier, 1, clip_pred_x0=False).gradient(x, t, PREDICT, SCHEDULE)
    assert not torch.allclose(step.grad, full.grad, rtol=1e-2)


def test_checkpointing_changes_memory_and_nothing_else(tmp_path):
    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path))
    samples = {
        mode: pipe(
            2, guidance=ClassifierGuidance(SmoothCNN(3), 1, scale=2.0, grad_mode=mode), on_step=lambda done: None
        ).samples
        for mode in ("full", "checkpoint")
    }
    # The same operations on the same numbers.
    torch.testing.assert_close(samples["checkpoint"], samples["full"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("every_k, expected", [(1, [6, 5, 4, 3, 2, 1]), (2, [6, 4, 2]), (4, [6, 2]), (9, [6])])
def test_every_k_asks_for_a_gradient_each_kth_step_and_feeds_the_stabilizer_at_each(every_k, expected):
    asked, fed = [], []

    class Guide(ClassifierGuidance):
        def gradient(self, x_t, t, predict_noise, schedule):
            asked.append(t)
            return super().gradient(x_t, t, predict_noise, schedule)

    class Spy(Stabilizer):
        def reset(self):
            fed.clear()

        def __call__(self, grad):
            fed.append(grad.clone())
            return grad

    guide = Guide(SmoothCNN(3).double(), 1, scale=2.0, stabilizer=Spy(), every_k=every_k)
    x = images()
    for t in range(6, 0, -1):
        _, shift = guide(x, t, PREDICT, SCHEDULE)
        torch.testing.assert_close(shift, 2.0 * fed[-1])
    assert asked == expected and len(fed) == 6
    for step, grad in enumerate(fed):
        assert torch.equal(grad, fed[step - step % every_k])
    guide.reset()
    guide(x, 5, PREDICT, SCHEDULE)
    assert asked[-1] == 5  # a new batch takes a gradient of its own at once


def trajectory(guidance, x, steps=range(6, 0, -1)):
    """Prediction and shift at each step of one fixed x."""
    guidance.reset()
    return [guidance(x, t, PREDICT, SCHEDULE) for t in steps]


@pytest.mark.parametrize("see", ["pred_x0", "x_t"])
def test_skip_above_drops_the_gradients_of_sure_samples_alone(see):
    """A sample sure at the last step gets a zero gradient, any other its own; predictions are everybody's."""
    settings = {"scale": 2.0, "input": see}
    plain = ClassifierGuidance(SmoothCNN(3).double(), 1, **settings)
    x = images()
    probabilities = [plain.gradient(x, t, PREDICT, SCHEDULE).logits.softmax(dim=1)[:, 1] for t in range(6, 0, -1)]
    threshold = float(torch.stack(probabilities).median())
    expected = trajectory(plain, x)
    found = trajectory(ClassifierGuidance(SmoothCNN(3).double(), 1, skip_above=threshold, **settings), x)
    kinds = set()
    for step, ((eps, shift), (eps_plain, shift_plain)) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(eps.eps, eps_plain.eps, rtol=1e-9, atol=1e-12)
        for sample in range(len(x)):
            sure = step > 0 and float(probabilities[step - 1][sample]) > threshold
            kinds.add(sure)
            wanted = 0 * shift_plain[sample] if sure else shift_plain[sample]
            torch.testing.assert_close(shift[sample], wanted, rtol=1e-9, atol=1e-12)
    assert kinds == {True, False}


def test_skipping_saves_the_u_nets_gradient():
    graphs = []

    def predict_noise(x, t):
        graphs.append((len(x), x.requires_grad))
        return PREDICT(x, t)

    guidance = ClassifierGuidance(SmoothCNN(3).double(), 1, skip_above=1e-6)
    for t in (6, 5):
        guidance(images(), t, predict_noise, SCHEDULE)
    assert graphs == [(len(images()), True), (len(images()), False)]


def test_a_time_conditioned_classifier_is_told_the_step():
    asked = []

    class NoiseAware(SmoothCNN):
        def forward(self, x, timesteps):
            asked.append(timesteps.tolist())
            return super().forward(x) * (1.0 + timesteps.reshape(-1, 1))

    guidance = ClassifierGuidance(NoiseAware(3).double(), 1, input="x_t", time_conditioned=True)
    x = images()
    step = guidance.gradient(x, 5, PREDICT, SCHEDULE)
    assert asked == [[4] * len(x)]  # diffusers' timestep of t = 5
    same = SmoothCNN(3).double().eval()
    expected = central_differences(lambda x: log_prob(lambda x: 5.0 * same(x), x, 1), x)
    torch.testing.assert_close(step.grad, expected, rtol=1e-5, atol=1e-7)
    guidance.check(x.float()[:1].double())


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)[:, :2]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grad_mode": "half"}, "grad_mode: 'half' is unknown; allowed: full, checkpoint, no_jacobian"),
        ({"every_k": 0}, "every_k: 0 is no whole number >= 1"),
        ({"every_k": 2.7}, "every_k: 2.7 is no whole number >= 1"),
        ({"skip_above": 0.0}, "skip_above: 0.0 is no probability in (0, 1]"),
        ({"time_conditioned": True}, "time_conditioned: a denoised image has no step; it goes with input x_t"),
    ],
)
def test_wrong_gradient_settings_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        ClassifierGuidance(SmoothCNN(3), 0, **settings)
    assert str(error.value) == message


def test_a_classifier_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="have no gradient with respect to its input"):
        ClassifierGuidance(Detached(), 0).check(torch.zeros(1, 3, 8, 8))
