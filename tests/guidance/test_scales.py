"""Guidance scales along the trajectory."""

import pytest
from torch import nn

from nrcg import ClassifierGuidance
from nrcg.config import ScaleScheduleConfig
from nrcg.guidance.scales import Cosine, Interval, Linear, from_config, parse


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Linear(10.0, 2.0), {1.0: 10.0, 0.5: 6.0, 0.0: 2.0}),
        (Cosine(10.0, 2.0), {1.0: 10.0, 0.5: 6.0, 0.25: 2 + 8 * 0.146447, 0.0: 2.0}),  # (1 - cos(pi / 4)) / 2
        (Interval(3.0, 0.2, 0.6), {1.0: 0.0, 0.6: 3.0, 0.4: 3.0, 0.2: 3.0, 0.1: 0.0}),
    ],
)
def test_scales_by_hand(schedule, expected):
    guidance = ClassifierGuidance(nn.Identity(), 0, scale=schedule)
    for share_left, scale in expected.items():
        assert guidance.scale_at(share_left) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(-1.0, 0.0), "start: -1.0 is not a finite number >= 0"),
        (lambda: Cosine(0.0, float("inf")), "end: inf is not a finite number >= 0"),
        (lambda: Interval(1.0, 0.7, 0.2), "low, high: 0.7, 0.2 are not 0 <= low <= high <= 1"),
    ],
)
def test_wrong_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=r"is not|are not") as error:
        make()
    assert str(error.value) == message


def test_a_constant_is_a_constant():
    assert ClassifierGuidance(nn.Identity(), 0, scale=2.5).scale_at(0.3) == 2.5


@pytest.mark.parametrize(
    "spec, settings, expected",
    [
        ("constant", {"name": "constant"}, 6.0),
        ("linear:0.5", {"name": "linear", "end": 0.5}, Linear(6.0, 3.0)),
        ("cosine:0", {"name": "cosine", "end": 0.0}, Cosine(6.0, 0.0)),
        ("interval:0.2,0.7", {"name": "interval", "low": 0.2, "high": 0.7}, Interval(6.0, 0.2, 0.7)),
    ],
)
def test_the_shell_and_the_config_say_the_same(spec, settings, expected):
    assert from_config(parse(spec), 6.0) == expected
    assert from_config(ScaleScheduleConfig(**settings), 6.0) == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("steep", "scale schedule 'steep' is unknown; allowed: constant, linear:END, cosine:END, interval:LOW,HIGH"),
        ("linear", "is unknown; allowed"),
        ("linear:a", "scale schedule 'linear:a': could not convert string to float: 'a'"),
        ("interval:0.7,0.2", "low, high: 0.7, 0.2 are not 0 <= low <= high <= 1"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(ValueError) as error:
        parse(spec)
    assert message in str(error.value)
