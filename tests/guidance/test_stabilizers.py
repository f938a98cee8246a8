"""Stabilizers against sequences worked out by hand, and what their state may and may not mix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg.config import StabilizerConfig
from nrcg.guidance import stabilizers
from nrcg.guidance.stabilizers import (
    EMA,
    PUBLISHED_STEPS,
    Adam,
    AdaptiveClip,
    Chain,
    Identity,
    NormClip,
    Stabilizer,
    UnitNorm,
    from_config,
    parse,
)

ALL = [Identity(), EMA(0.9), Adam(0.9, 0.999, 1e-4)]


def gradients(steps: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps, batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(stabilizer: Stabilizer, grads: torch.Tensor) -> torch.Tensor:
    """The smoothed gradients of one trajectory, from zero state."""
    stabilizer.reset()
    return torch.stack([stabilizer(grad) for grad in grads])


def pixel(*values: float) -> torch.Tensor:
    """A trajectory of images of one pixel, in float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)


# --- eqs. 7 and 8 by hand --------------------------------------------------------------------------------------------


def test_ema_by_hand():
    # m = 0 -> 0.1 * 1 = 0.1 -> 0.9 * 0.1 + 0.1 * 2 = 0.29 -> 0.9 * 0.29 - 0.1 * 4 = -0.139: no debiasing.
    smoothed = run(EMA(0.9), pixel(1.0, 2.0, -4.0)).flatten().tolist()
    assert smoothed == pytest.approx([0.1, 0.29, -0.139], rel=1e-12)


def test_adam_by_hand():
    # b1 = 0.5, b2 = 0.75, eps = 0.5. m: 1, -0.5, 0.75. v: 0.25 * 4 = 1, 0.75 + 0.25 * 4 = 1.75, 1.3125 + 1 = 2.3125.
    smoothed = run(Adam(0.5, 0.75, 0.5), pixel(2.0, -2.0, 2.0)).flatten().tolist()
    assert smoothed == pytest.approx([1 / 1.5, -0.5 / (1.75**0.5 + 0.5), 0.75 / (2.3125**0.5 + 0.5)], rel=1e-12)


def test_identity_changes_nothing():
    grads = gradients(3)
    assert torch.equal(run(Identity(), grads), grads)


def test_ema_of_a_constant_gradient():
    smoothed = run(EMA(0.99), pixel(*[3.0] * 200)).flatten()
    expected = 3.0 * (1 - 0.99 ** torch.arange(1, 201, dtype=torch.float64))
    torch.testing.assert_close(smoothed, expected, rtol=1e-12, atol=0)


def made(spec: str):
    """What the shell's words make."""
    return from_config(parse(spec), PUBLISHED_STEPS)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_published_adam_amplifies_the_first_steps_6_6_times(size):
    """(1 - 0.9^n) / sqrt(1 - 0.999^n) at a constant gradient: 3.16 at once, 6.6 at its peak, 1 in the end."""
    smoothed = run(Adam(0.9, 0.999, 1e-12), pixel(*[size] * 12_000)).flatten()
    assert float(smoothed[0]) == pytest.approx(0.1 / 0.001**0.5, rel=1e-6)
    assert float(smoothed.max()) == pytest.approx(6.6, abs=0.05)  # published to one decimal
    assert 8 <= int(smoothed.argmax()) + 1 <= 16
    assert float(smoothed[-1]) == pytest.approx(1.0, abs=1e-4)  # 0.999^12000 = 6e-6


def test_undebiased_ema_never_amplifies():
    assert float(run(EMA(0.99), pixel(*[1.0] * 400)).max()) < 1.0


def test_adams_eps_turns_it_into_a_scaled_ema():
    grads = 1e-8 * gradients(20).double()
    # sqrt(v) <= 4e-8 against eps = 1: relative 4e-8.
    torch.testing.assert_close(run(Adam(0.9, 0.999, 1.0), grads), run(EMA(0.9), grads), rtol=1e-6, atol=0)


def test_ema_forgets_an_impulse_by_beta_a_step():
    smoothed = run(EMA(0.99), pixel(1.0, *[0.0] * 100)).flatten()
    # 37 % of a gradient is left after 100 steps: what a state carried over would mix into the next images.
    assert float(smoothed[100] / smoothed[0]) == pytest.approx(0.37, abs=0.005)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilizer", ALL, ids=repr)
def test_reset_forgets_everything(stabilizer):
    first = run(stabilizer, gradients(10, seed=1))
    run(stabilizer, gradients(10, seed=2))
    assert torch.equal(run(stabilizer, gradients(10, seed=1)), first)


@pytest.mark.parametrize("stabilizer", [EMA(0.99), Adam()], ids=repr)
def test_without_reset_another_trajectory_would_leak(stabilizer):
    """Why `reset` is there: the first smoothed gradient of the next batch would hold the former images'."""
    fresh = run(stabilizer, gradients(10, seed=1))[0]
    run(stabilizer, gradients(100, seed=2))
    assert not torch.allclose(stabilizer(gradients(10, seed=1)[0]), fresh)


@pytest.mark.parametrize("stabilizer", ALL, ids=repr)
def test_samples_do_not_mix(stabilizer):
    grads = gradients(10, batch=4)
    together = run(stabilizer, grads)
    for i in range(4):
        assert torch.equal(run(stabilizer, grads[:, i : i + 1]), together[:, i : i + 1])


@pytest.mark.parametrize("stabilizer", [EMA(0.9), Adam()], ids=repr)
def test_a_non_finite_sample_stays_alone(stabilizer):
    grads = gradients(10, batch=4)
    broken = grads.clone()
    broken[3, 1] = float("nan")
    whole, spoilt = run(stabilizer, grads), run(stabilizer, broken)
    others = [0, 2, 3]
    assert torch.equal(whole[:, others], spoilt[:, others])
    assert spoilt[3:, 1].isnan().all()


@pytest.mark.parametrize("stabilizer", ALL, ids=repr)
def test_a_smaller_last_batch_follows_a_full_one(stabilizer):
    grads = gradients(5, batch=4)
    run(stabilizer, grads)
    assert torch.equal(run(stabilizer, grads[:, :2]), run(stabilizer, grads)[:, :2])


@pytest.mark.parametrize("stabilizer", ALL, ids=repr)
def test_the_callers_gradient_and_the_former_output_stay_as_they_were(stabilizer):
    grads = gradients(3)
    stabilizer.reset()
    first_grad = grads[0].clone()
    first = stabilizer(grads[0])
    kept = first.clone()
    stabilizer(grads[1])
    assert torch.equal(grads[0], first_grad) and torch.equal(first, kept)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMA(1.0), r"beta: 1\.0 is not in \[0, 1\)"),
        (lambda: EMA(-0.1), r"beta: -0\.1 is not in \[0, 1\)"),
        (lambda: EMA(float("nan")), r"beta: nan"),
        (lambda: Adam(beta1=1.0), r"beta1: 1\.0"),
        (lambda: Adam(beta2=2.0), r"beta2: 2\.0"),
        (lambda: Adam(eps=0.0), r"eps: 0\.0 is not positive"),
        (lambda: Adam(eps=float("nan")), r"eps: nan"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("none", "Identity"),
        ("ema:0.99", "EMA(0.99)"),
        ("ema:0", "EMA(0)"),
        ("adam", "Adam(0.9, 0.999, eps=0.0001)"),
        ("adam:0.5,0.75,0.1", "Adam(0.5, 0.75, eps=0.1)"),
        ("unit_norm", "UnitNorm()"),
        ("norm_clip:2.5", "NormClip(2.5)"),
        ("adaptive_clip", "AdaptiveClip(2, 0.9)"),
        ("adaptive_clip:3,0.5+ema:0.99", "Chain(AdaptiveClip(3, 0.5), EMA(0.99))"),
        ("adam_debiased", "Adam(0.9, 0.999, eps=0.0001, debias=True)"),
        (f"{__name__}:Halve", "Halve once"),
        (f"{__name__}:Halve:2", "Halve twice"),
    ],
)
def test_parse(spec, expected):
    assert expected in repr(made(spec))


@pytest.mark.parametrize("spec", ["", "none:1", "ema", "ema:0.9,0.9", "adam:0.9", "adam:1,2,3,4", "sgd", "EMA:0.9"])
def test_parse_teaches_the_allowed_forms(spec):
    with pytest.raises(ValueError) as error:
        parse(spec)
    assert str(error.value).startswith(
        f"stabilizer {spec!r} is unknown; allowed: none, ema:BETA, adam[:BETA1,BETA2,EPS]"
    )


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("ema:1.5", ": beta: 1.5 is not in [0, 1)"),
        ("ema:x", ": could not convert"),
        ("adam:0.9,0.99,0", ": eps: 0"),
        ("norm_clip:0", ": max_norm: 0.0 is not positive"),
        ("adaptive_clip:2,1", ": beta: 1.0 is not in [0, 1)"),
        ("nowhere:Halve", ": cannot be imported: No module named 'nowhere'"),
        ("math:pi", ": math.pi is no subclass of nrcg.Stabilizer"),
        (f"{__name__}:Halve:1,2", " is unknown; allowed"),
    ],
)
def test_parse_says_what_is_wrong(spec, reason):
    with pytest.raises(ValueError) as error:
        parse(spec)
    message = str(error.value)
    assert message.startswith(f"stabilizer {spec!r}{reason}") and "\n" not in message


def test_config_betas_hold_at_400_steps():
    ema = StabilizerConfig(name="ema", beta=0.99)
    assert from_config(ema, 400).beta == pytest.approx(0.99)
    # 0.99^4 = 0.9606, the 0.96 of the method at T = 100.
    assert from_config(ema, 100).beta == pytest.approx(0.99**4)
    adam = from_config(StabilizerConfig(name="adam", beta1=0.9, beta2=0.999, eps=1e-4), 1000)
    assert (adam.beta1, adam.beta2, adam.eps) == pytest.approx((0.9**0.4, 0.999**0.4, 1e-4))
    assert isinstance(from_config(StabilizerConfig(name="none"), 100), Identity)


def test_scaled_betas_smooth_over_the_same_share_of_the_trajectory():
    """A gradient that is a function of t / T: the smoothed one is too, up to the discretisation."""
    ema = StabilizerConfig(name="ema", beta=0.99)
    curves = {}
    for steps in (400, 800):
        u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        curves[steps] = run(from_config(ema, steps), pixel(*torch.sin(6 * u).tolist())).flatten()
    # One step of 1/400 of a curve of slope <= 6 is 0.015; the discretisations differ by half of one.
    torch.testing.assert_close(curves[800][1::2], curves[400], rtol=0, atol=0.0075)


# --- what the paper leaves to future work ----------------------------------------------------------------------------


def test_debiased_adam_by_hand():
    """On a constant gradient the debiased averages are exact from the first step: g / (|g| + eps)."""
    adam = Adam(0.9, 0.999, eps=0.1, debias=True)
    grad = torch.tensor([0.3, -2.0]).reshape(2, 1, 1, 1)
    for _ in range(5):
        torch.testing.assert_close(adam(grad), grad / (grad.abs() + 0.1), rtol=1e-4, atol=0)  # float32 powers
    adam.reset()
    torch.testing.assert_close(adam(grad), grad / (grad.abs() + 0.1), rtol=1e-4, atol=0)


def norms(grad):
    return grad.flatten(1).norm(dim=1)


def test_unit_norm_and_norm_clip_are_per_sample():
    grad = torch.stack([torch.full((1, 2, 2), value) for value in (2.0, 0.1, 0.0)])  # norms 4, 0.2, 0
    torch.testing.assert_close(norms(UnitNorm()(grad)), torch.tensor([1.0, 1.0, 0.0]))
    clipped = NormClip(1.0)(grad)
    torch.testing.assert_close(norms(clipped), torch.tensor([1.0, 0.2, 0.0]))
    assert torch.equal(clipped[1], grad[1])


def test_adaptive_clip_bounds_an_outlier_by_the_samples_own_past():
    clip = AdaptiveClip(factor=2.0, beta=0.5)
    one = torch.ones(2, 1, 1, 1)
    assert torch.equal(clip(one), one)
    spike = torch.tensor([100.0, 1.5]).reshape(2, 1, 1, 1)
    # Both averages are 1: the first sample is cut to 2, the second, below 2, stays.
    torch.testing.assert_close(clip(spike).flatten(), torch.tensor([2.0, 1.5]))
    # Averages 0.5 + 0.5 * 2 = 1.5 and 1.25; peaks 100 and 1.5, which bound the next: 200 and 3.
    torch.testing.assert_close(clip(spike * 10).flatten(), torch.tensor([200.0, 3.0]))
    clip.reset()
    torch.testing.assert_close(clip(spike), spike)


def test_adaptive_clip_takes_no_zero_for_a_measurement():
    """Neither a first gradient of zero nor those that skip_above writes: both samples end alike."""
    clip, one = AdaptiveClip(factor=2.0, beta=0.5), torch.ones(2, 1, 1, 1)
    gate = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    assert torch.equal(clip(gate), gate)
    assert torch.equal(clip(3 * one).flatten(), torch.tensor([3.0, 2.0]))  # the first sample's first, the other's bound
    for _ in range(20):
        assert torch.equal(clip(torch.zeros_like(one)), torch.zeros_like(one))
    # Averages 3 and 1.5, peaks 3 and 3: bounds 6 and 6, whatever many zeros came between.
    torch.testing.assert_close(clip(10 * one).flatten(), torch.tensor([6.0, 6.0]))


def test_adaptive_clip_answers_a_gradient_that_comes_again_as_before():
    """every_k feeds the last gradient again: a spike must not pass at its second step."""
    clip = AdaptiveClip(factor=2.0, beta=0.5)
    clip(torch.ones(1, 1, 1, 1))
    spike = torch.full((1, 1, 1, 1), 50.0)
    assert [float(clip(spike)) for _ in range(3)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-20, 1.0, 1e30])
def test_norms_of_gradients_of_any_size(size):
    """3-4-5: squares of 1e-25 are lost in float32. Tolerance: a denormal of 1e-40 has four digits."""
    grad = torch.tensor([3.0, 4.0]).mul(size).reshape(1, 1, 1, 2)
    torch.testing.assert_close(UnitNorm()(grad).flatten(), torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)
    assert float(stabilizers.norms(grad)) == pytest.approx(5 * size, rel=1e-4)
    clipped = NormClip(2.5 * size)(grad).flatten()
    torch.testing.assert_close(clipped, torch.tensor([1.5, 2.0]) * size, rtol=1e-3, atol=0)
    assert torch.equal(UnitNorm()(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


def test_chain_feeds_one_with_the_last_ones_result():
    chain = Chain(NormClip(1.0), EMA(0.5))
    grad = torch.full((1, 1, 1, 1), 8.0)
    assert [float(chain(grad)) for _ in range(2)] == [0.5, 0.75]
    chain.reset()
    assert float(chain(grad)) == 0.5


# --- settings of config.yaml -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, shown",
    [
        ({"name": "none"}, Identity()),
        ({"name": "unit_norm"}, "UnitNorm()"),
        ({"name": "norm_clip", "max_norm": 2.5}, "NormClip(2.5)"),
        ({"name": "adaptive_clip", "factor": 3.0, "beta": 0.81}, "AdaptiveClip(3, 0.9)"),  # 0.81^(400/800)
        (
            {"name": "adam_debiased", "beta1": 0.81, "beta2": 0.9801, "eps": 0.01},
            "Adam(0.9, 0.99, eps=0.01, debias=True)",
        ),
        (
            {"name": "chain", "of": [{"name": "unit_norm"}, {"name": "ema", "beta": 0.81}]},
            "Chain(UnitNorm(), EMA(0.9))",
        ),
        ({"name": __name__ + ":Halve", "arguments": {"times": 2}}, "Halve twice"),
    ],
)
def test_every_stabilizer_of_the_config(settings, shown):
    made = from_config(StabilizerConfig.model_validate(settings), 800)
    assert isinstance(made, Identity) if isinstance(shown, Identity) else repr(made) == shown


class Halve(Stabilizer):
    def __init__(self, times: int = 1):
        self.times = int(times)

    def reset(self):
        pass

    def __call__(self, grad):
        return grad / 2**self.times

    def __repr__(self):
        return "Halve twice" if self.times == 2 else "Halve once"


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("nowhere.at:All", None, "stabilizer 'nowhere.at:All': cannot be imported"),
        (__name__ + ":pixel", None, "is no subclass of nrcg.Stabilizer"),
        (__name__ + ":Halve", {"speed": 1}, "unexpected keyword argument 'speed'"),
    ],
)
def test_ones_own_class_that_cannot_be_made(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_config(StabilizerConfig(name=name, arguments=arguments), 100)


# --- properties ------------------------------------------------------------------------------------------------------

PER_SAMPLE = [
    lambda: EMA(0.9),
    lambda: Adam(0.9, 0.999, 1e-4),
    lambda: Adam(0.9, 0.999, 1e-4, debias=True),
    lambda: UnitNorm(),
    lambda: NormClip(1.5),
    lambda: AdaptiveClip(2.0, 0.8),
    lambda: Chain(AdaptiveClip(), EMA(0.7)),
]
TRAJECTORY = st.integers(0, 2**31)


@given(kind=st.sampled_from(range(len(PER_SAMPLE))), seed=TRAJECTORY, order=st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_permuting_the_samples_permutes_the_result(kind, seed, order):
    grads = gradients(5, batch=4, seed=seed)
    whole = run(PER_SAMPLE[kind](), grads)
    torch.testing.assert_close(run(PER_SAMPLE[kind](), grads[:, order]), whole[:, order], rtol=1e-6, atol=0)


@given(beta=st.floats(0, 0.999), seed=TRAJECTORY, factor=st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_ema_is_linear_and_never_longer_than_the_longest_gradient(beta, seed, factor):
    grads = gradients(6, seed=seed).double()
    smoothed = run(EMA(beta), grads)
    torch.testing.assert_close(run(EMA(beta), factor * grads), factor * smoothed, rtol=1e-9, atol=0)
    norms = smoothed.flatten(2).norm(dim=2)
    assert (norms <= grads.flatten(2).norm(dim=2).amax(dim=0) * (1 + 1e-9)).all()


@given(bound=st.floats(1e-3, 1e3), seed=TRAJECTORY, size=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_clipping_keeps_direction_and_bound(bound, seed, size):
    grads = size * gradients(3, seed=seed).double()
    clipped = run(NormClip(bound), grads)
    cosine = torch.cosine_similarity(clipped.flatten(2), grads.flatten(2), dim=2)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=0)
    expected = grads.flatten(2).norm(dim=2).clamp(max=bound)
    torch.testing.assert_close(clipped.flatten(2).norm(dim=2), expected, rtol=1e-9, atol=0)
