"""The forward analysis of models whose logits, gradients and sensitivities are worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from toys import LinearClassifier, TwoGaussians

from nrcg.classifiers.logits import class_log_prob
from nrcg.diffusion.noise import sample_noise
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.sensitivity import forward_analysis, sensitivity
from nrcg.guidance.stabilizers import EMA, Identity
from nrcg.report.columns import FORWARD_COLUMNS

SCHEDULE = Schedule.linear(8, 0.02, 0.4)
SHAPE = (2, 4, 4)
SEED = 3


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def weight(k: int = 3, seed: int = 1, size: float = 0.3) -> torch.Tensor:
    return size * torch.randn(k, 32, generator=torch.Generator().manual_seed(seed))


def zero_noise(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.zeros_like(x)


def analyse(x0, *, classifiers, predict_noise=zero_noise, stabilizers=None, labels=None, **settings):
    """{method: {column: (T,) array}}."""
    rows = forward_analysis(
        x0,
        torch.zeros(len(x0), dtype=torch.int64) if labels is None else labels,
        classifiers=classifiers,
        predict_noise=predict_noise,
        schedule=SCHEDULE,
        stabilizers=stabilizers or {},
        target=settings.pop("target", 0),
        seed=SEED,
        batch_size=settings.pop("batch_size", 8),
        **settings,
    )
    methods = dict.fromkeys(row["method"] for row in rows)
    return {
        method: {
            column: np.array([row[column] for row in rows if row["method"] == method]) for column in FORWARD_COLUMNS[1:]
        }
        for method in methods
    }


def trajectory(x0: torch.Tensor) -> list[torch.Tensor]:
    """x_0..x_T of eq. 2 in float64, with the images' own noise, the same at each t."""
    noise = sample_noise(SEED, range(len(x0)), 0, SHAPE).double()
    abar = [float(value) for value in SCHEDULE.abar]
    return [a**0.5 * x0.double() + (1 - a) ** 0.5 * noise for a in abar]


def changes(values: list[torch.Tensor], x: list[torch.Tensor]) -> np.ndarray:
    """(T, N): norm2(v_t - v_{t-1}) / norm2(x_t - x_{t-1}) of eqs. 3, 4 and 6, for t = 1..T."""
    return np.array(
        [
            ((values[t] - values[t - 1]).flatten(1).norm(dim=1) / (x[t] - x[t - 1]).flatten(1).norm(dim=1)).numpy()
            for t in range(1, len(x))
        ]
    )


def assert_columns(curves, name, expected):
    # float32 against float64: differences of neighbouring steps cancel two to three digits.
    np.testing.assert_allclose(curves[f"{name}_mean"], expected.mean(axis=1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(curves[f"{name}_std"], expected.std(axis=1), rtol=5e-3, atol=1e-6)


def softmax_gradient(w: torch.Tensor, x: torch.Tensor, target: int) -> torch.Tensor:
    """grad log softmax(W x)_target = W_target - W^T softmax(W x), by hand."""
    return w.double()[target] - torch.softmax(x.flatten(1) @ w.double().T, dim=1) @ w.double()


# --- eqs. 3, 4 and 6 -------------------------------------------------------------------------------------------------


def test_sensitivity_by_hand():
    now, before = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert sensitivity(now, before, torch.tensor([2.0, 4.0])).tolist() == [2.5, 0.5]


@pytest.mark.parametrize("target", [0, 2])
def test_linear_classifiers_on_x_t(target):
    x0, x = images(), trajectory(images())
    weights = {"robust": weight(seed=1), "non_robust": weight(seed=2)}
    curves = analyse(x0, classifiers={k: LinearClassifier(w) for k, w in weights.items()}, target=target)
    for role, w in weights.items():
        logits = [x_t.flatten(1) @ w.double().T for x_t in x]
        assert_columns(curves[role], "logit_sensitivity", changes(logits, x))
        grads = [softmax_gradient(w, x_t, target) for x_t in x]
        assert_columns(curves[role], "gradient_sensitivity", changes(grads, x))


def test_logit_sensitivity_of_one_image_without_noise_is_the_norm_along_it(monkeypatch):
    """With eps = 0 all x_t lie along x_0: S_logit is norm2(W x_0) / norm2(x_0) at every t."""
    monkeypatch.setattr("nrcg.guidance.sensitivity.sample_noise", lambda *_: torch.zeros(1, *SHAPE))
    x0, w = images(1), weight()
    curves = analyse(x0, classifiers={"non_robust": LinearClassifier(w)})["non_robust"]
    expected = float((x0.flatten(1) @ w.T).norm() / x0.norm())
    np.testing.assert_allclose(curves["logit_sensitivity_mean"], expected, rtol=1e-3)  # float32 cancellation


class QuadraticLogProb(nn.Module):
    """log p(class 1 | x) = -k / 2 norm2(x)^2 up to a constant, while it is far below zero."""

    def __init__(self, k: float):
        super().__init__()
        self.k = k

    def forward(self, x):
        return -self.k / 2 * x.square().sum(dim=(1, 2, 3)).unsqueeze(1) - 40.0


def test_a_quadratic_log_prob_has_a_constant_gradient_sensitivity():
    # One logit z << 0: log sigmoid(z) = z up to e^-40, so g = -k x and S_grad = k for each image and t.
    curves = analyse(images(), classifiers={"non_robust": QuadraticLogProb(1.7)}, target=1)["non_robust"]
    np.testing.assert_allclose(curves["gradient_sensitivity_mean"], 1.7, rtol=1e-4)  # float32 differences
    np.testing.assert_allclose(curves["gradient_sensitivity_std"], 0.0, atol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
def test_the_denoised_image_goes_through_the_u_net_of_its_own_step(clip):
    """eq. 6 by hand: eps_theta is linear in x with a factor c_t, so x0hat = j_t x_t; at t = 0 it is x_0 itself."""
    x0, w = images(), weight()
    x = trajectory(x0)

    def predict_noise(x, t):
        return 0.1 * t * x

    abar = [float(value) for value in SCHEDULE.abar]
    factor = [1.0, *((1 - (1 - abar[t]) ** 0.5 * 0.1 * t) / abar[t] ** 0.5 for t in range(1, len(x)))]
    x0hat = [f * x_t for f, x_t in zip(factor, x, strict=True)]
    inside = [(value.abs() <= 1).flatten(1) | (not clip) | (t == 0) for t, value in enumerate(x0hat)]
    seen = [value.clamp(-1, 1) if clip else value for value in x0hat]
    grads = [f * softmax_gradient(w, s, 1) * i for f, s, i in zip(factor, seen, inside, strict=True)]
    curves = analyse(
        x0,
        classifiers={"non_robust": LinearClassifier(w)},
        predict_noise=predict_noise,
        target=1,
        clip_pred_x0=clip,
    )["non_robust_x0"]
    assert_columns(curves, "logit_sensitivity", changes([s.flatten(1) @ w.double().T for s in seen], x))
    assert_columns(curves, "gradient_sensitivity", changes(grads, x))


def test_accuracy_by_hand():
    x0, w = images(20), weight()
    labels = (x0.flatten(1) @ w.T).argmax(dim=1)
    curves = analyse(x0, classifiers={"non_robust": LinearClassifier(w)}, labels=labels)
    right = [(x_t.flatten(1) @ w.double().T).argmax(dim=1) == labels for x_t in trajectory(x0)]
    np.testing.assert_allclose(curves["non_robust"]["accuracy"], [float(r.double().mean()) for r in right[1:]])
    # A perfect denoiser gives the clean image, and the clean image's class, back at every t.
    noise = sample_noise(SEED, range(20), 0, SHAPE)
    perfect = analyse(
        x0, classifiers={"non_robust": LinearClassifier(w)}, labels=labels, batch_size=20,
        predict_noise=lambda x, t: noise,
    )  # fmt: skip
    assert (perfect["non_robust_x0"]["accuracy"] == 1.0).all()


# --- stabilizers -----------------------------------------------------------------------------------------------------


class Tilt(nn.Module):
    """One logit that is linear and far below zero: its log-probability has the constant gradient w."""

    def forward(self, x):
        return x.sum(dim=(1, 2, 3)).unsqueeze(1) - 200.0


def test_ema_of_a_constant_gradient():
    """g = 1 everywhere: m_t = 1 - b^(T - t + 1), from t = T down, so norm2(m_t - m_{t-1}) = b^n (1 - b) sqrt(D)."""
    x0, b = images(), 0.8
    x = trajectory(x0)
    # x0hat must have the constant gradient 1 too: eps = (1 - sqrt(abar)) / sqrt(1 - abar) x makes x0hat = x_t.
    abar = SCHEDULE.abar

    def predict_noise(x, t):
        return float((1 - abar[t] ** 0.5) / (1 - abar[t]) ** 0.5) * x

    curves = analyse(
        x0,
        classifiers={"non_robust": Tilt()},
        predict_noise=predict_noise,
        stabilizers={"ema": EMA(b), "none": Identity()},
        target=1,
        clip_pred_x0=False,
    )
    assert list(curves) == ["non_robust", "non_robust_x0", "non_robust_x0_ema", "non_robust_x0_none"]
    num_steps = SCHEDULE.num_steps
    smoothed = [torch.full((5, 32), 1 - b ** (num_steps - t + 1), dtype=torch.float64) for t in range(num_steps + 1)]
    assert_columns(curves["non_robust_x0_ema"], "gradient_sensitivity", changes(smoothed, x))
    # float32 noise of a gradient of 1 over distances of 0.5 and more.
    np.testing.assert_allclose(curves["non_robust_x0"]["gradient_sensitivity_mean"], 0.0, atol=1e-5)
    for column in FORWARD_COLUMNS[3:]:
        np.testing.assert_array_equal(curves["non_robust_x0_none"][column], curves["non_robust_x0"][column])


def test_stabilizers_see_the_trajectory_from_its_noisy_end():
    """eq. 7 with the gradients by hand, starting at t = T."""
    x0, w, b = images(), weight(), 0.6
    x = trajectory(x0)
    mean, smoothed = 0.0, []
    for t in range(SCHEDULE.num_steps, -1, -1):
        factor = float(SCHEDULE.abar[t]) ** -0.5
        mean = b * mean + (1 - b) * factor * softmax_gradient(w, factor * x[t], 0)
        smoothed.insert(0, mean)
    curves = analyse(
        x0, classifiers={"non_robust": LinearClassifier(w)}, stabilizers={"ema": EMA(b)}, clip_pred_x0=False
    )
    assert_columns(curves["non_robust_x0_ema"], "gradient_sensitivity", changes(smoothed, x))


# --- a new noise at every step ---------------------------------------------------------------------------------------


def test_a_noise_of_its_own_at_every_step():
    """As the released code: x_t and x_{t-1} share the noise of t, and each has a stabilizer of its own (eqs. 6, 7)."""
    x0, w, b = images(), weight(), 0.6
    abar = [float(value) for value in SCHEDULE.abar]
    means, logit_changes, ema_changes, right = [0.0, 0.0], [], [], []
    for t in range(SCHEDULE.num_steps, 0, -1):
        noise = sample_noise(SEED, range(len(x0)), t, SHAPE).double()
        pair = [abar[s] ** 0.5 * x0.double() + (1 - abar[s]) ** 0.5 * noise for s in (t, t - 1)]
        logits = [x.flatten(1) @ w.double().T for x in pair]
        logit_changes.insert(0, changes(logits[::-1], pair[::-1])[0])
        right.insert(0, float((logits[0].argmax(dim=1) == 0).double().mean()))
        for which, s in enumerate((t, t - 1)):
            factor = abar[s] ** -0.5  # of x0hat, where eps_theta = 0
            means[which] = b * means[which] + (1 - b) * factor * softmax_gradient(w, factor * pair[which], 0)
        ema_changes.insert(0, changes(means[::-1], pair[::-1])[0])
    steps: list[int] = []
    settings = {"classifiers": {"non_robust": LinearClassifier(w)}, "clip_pred_x0": False, "noise": "per_step"}
    curves = analyse(x0, **settings, stabilizers={"ema": EMA(b)}, on_step=steps.append)
    assert_columns(curves["non_robust"], "logit_sensitivity", np.array(logit_changes))
    assert_columns(curves["non_robust_x0_ema"], "gradient_sensitivity", np.array(ema_changes))
    np.testing.assert_allclose(curves["non_robust"]["accuracy"], right)
    assert steps[-1] == len(x0) * SCHEDULE.num_steps
    parts = analyse(x0, **settings, stabilizers={"ema": EMA(b)}, batch_size=2)
    for column in FORWARD_COLUMNS[3:]:
        np.testing.assert_allclose(
            parts["non_robust_x0_ema"][column], curves["non_robust_x0_ema"][column], rtol=1e-3, atol=1e-5
        )
    with pytest.raises(ValueError, match="noise 'none' is unknown; allowed: per_image, per_step"):
        analyse(x0, classifiers={"non_robust": LinearClassifier(w)}, noise="none")


# --- cost, rows, batches ---------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts forward passes and backward passes to its input."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forwards, self.backwards = module, 0, 0

    def forward(self, x):
        self.forwards += 1
        logits = self.module(x)
        logits.register_hook(self._count)
        return logits

    def _count(self, grad):
        self.backwards += 1


def test_one_gradient_a_step_and_classifier():
    """T + 1 gradients for T differences, not 2 T; `non_robust` sees x_t and x0hat."""
    robust, non_robust = Counting(LinearClassifier(weight())), Counting(LinearClassifier(weight()))
    steps, asked = [], []

    def predict_noise(x, t):
        asked.append(t)
        return torch.zeros_like(x)

    analyse(
        images(),
        classifiers={"robust": robust, "non_robust": non_robust},
        predict_noise=predict_noise,
        stabilizers={"ema90": EMA(0.9), "ema99": EMA(0.99)},
        batch_size=3,
        on_step=steps.append,
    )
    batches, per_batch = 2, SCHEDULE.num_steps + 1
    assert (robust.forwards, robust.backwards) == (batches * per_batch,) * 2
    assert (non_robust.forwards, non_robust.backwards) == (2 * batches * per_batch,) * 2
    assert asked == batches * list(range(SCHEDULE.num_steps, 0, -1))
    # Images advanced by a step.
    assert np.diff([0, *steps]).tolist() == [3] * SCHEDULE.num_steps + [2] * SCHEDULE.num_steps


def test_rows():
    rows = forward_analysis(
        images(),
        torch.zeros(5, dtype=torch.int64),
        classifiers={"robust": LinearClassifier(weight()), "non_robust": LinearClassifier(weight())},
        predict_noise=zero_noise,
        schedule=SCHEDULE,
        stabilizers={"ema99": EMA(0.99)},
        target=0,
        seed=0,
        batch_size=5,
    )
    methods = ("robust", "non_robust", "non_robust_x0", "non_robust_x0_ema99")
    assert [(row["method"], row["t"]) for row in rows] == [(m, t) for m in methods for t in range(1, 9)]
    for row in rows:
        assert tuple(row) == FORWARD_COLUMNS
        assert row["num_images"] == 5 and 0 <= row["accuracy"] <= 1
        assert all(np.isfinite(row[column]) for column in FORWARD_COLUMNS[3:])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_change_nothing(batch_size):
    data = TwoGaussians(SCHEDULE, 0.5, 0.3)
    settings = {
        "classifiers": {"non_robust": LinearClassifier(weight())},
        "predict_noise": data.predict_noise,
        "labels": torch.tensor([0, 1, 2, 0, 1]),
    }
    whole = analyse(images(), stabilizers={"ema": EMA(0.9)}, batch_size=5, **settings)
    parts = analyse(images(), stabilizers={"ema": EMA(0.9)}, batch_size=batch_size, **settings)
    for method, columns in whole.items():
        for column, values in columns.items():
            # Matrix products of another size may round differently; differences of steps magnify that.
            np.testing.assert_allclose(parts[method][column], values, rtol=1e-3, atol=1e-5)


def test_the_target_class_is_the_one_differentiated():
    w = weight(k=1)
    first, second = (
        analyse(images(), classifiers={"non_robust": LinearClassifier(w)}, target=target) for target in (0, 1)
    )
    column = "gradient_sensitivity_mean"
    # d/dz log sigmoid(z) and log sigmoid(-z) differ by the constant 1: their changes are equal.
    np.testing.assert_allclose(first["non_robust"][column], second["non_robust"][column], rtol=1e-3, atol=1e-6)
    logits = torch.tensor([[0.3]])
    assert float((class_log_prob(logits, 1) - class_log_prob(logits, 0))[0]) == pytest.approx(0.3, abs=1e-6)
