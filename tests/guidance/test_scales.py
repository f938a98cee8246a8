"""Guidance scales along the trajectory."""

import pytest
import torch
from torch import nn
from toys import vp_schedule

from nrcg import ClassifierGuidance
from nrcg.config import ScaleScheduleConfig
from nrcg.csv_files import write_csv
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import DataError
from nrcg.guidance.scales import SNR, Cosine, Interval, Linear, from_config, informed_interval, parse


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
        assert guidance.scale_at(round(100 * share_left), vp_schedule(100)) == pytest.approx(scale, rel=1e-5)


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
    assert ClassifierGuidance(nn.Identity(), 0, scale=2.5).scale_at(3, vp_schedule(100)) == 2.5


def test_a_scale_by_snr_follows_the_noise_not_the_step():
    """scale * SNR / (SNR + gamma) by hand; the same at the same abar of another schedule."""
    schedule, other = vp_schedule(100), Schedule.of_levels(torch.tensor([1.0, 0.5, 0.1]))
    guidance = ClassifierGuidance(nn.Identity(), 0, scale=SNR(6.0, 2.0))
    for t in (1, 40, 100):
        snr = float(schedule.abar[t]) / (1 - float(schedule.abar[t]))
        assert guidance.scale_at(t, schedule) == pytest.approx(6.0 * snr / (snr + 2.0), rel=1e-9)
    assert guidance.scale_at(1, other) == pytest.approx(6.0 * 1.0 / 3.0, rel=1e-6)
    assert guidance.acts_at(100, schedule)


FORWARD = [
    {"method": "robust", "t": float(t), "accuracy": accuracy}
    for t, accuracy in enumerate((1.0, 1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.35, 0.33, 0.33), start=1)
]


def test_the_interval_of_a_forward_analysis_ends_half_way_to_blindness():
    """Best 1, blind 0.33: half way is 0.665, last reached at t = 4 of 10."""
    assert informed_interval(FORWARD, "robust") == (0.0, 0.4)
    with pytest.raises(ValueError, match="method 'x0' is not in the forward analysis; it has robust"):
        informed_interval(FORWARD, "x0")
    with pytest.raises(ValueError, match="its accuracy is nowhere above that at t = T"):
        informed_interval([row | {"accuracy": 0.3} for row in FORWARD], "robust")


def test_the_shell_reads_a_forward_analysis(tmp_path):
    write_csv(tmp_path / "forward, old.csv", FORWARD, ["method", "t", "accuracy"])
    assert from_config(parse(f"forward:{tmp_path}/forward, old.csv,robust"), 6.0) == Interval(6.0, 0.0, 0.4)
    with pytest.raises(DataError, match="no such file"):
        parse("forward:nowhere.csv,robust")


@pytest.mark.parametrize(
    "spec, settings, expected",
    [
        ("constant", {"name": "constant"}, 6.0),
        ("linear:0.5", {"name": "linear", "end": 0.5}, Linear(6.0, 3.0)),
        ("cosine:0", {"name": "cosine", "end": 0.0}, Cosine(6.0, 0.0)),
        ("snr:0.5", {"name": "snr", "gamma": 0.5}, SNR(6.0, 0.5)),
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
        ("snr:0", "gamma: 0.0 is not a finite number above 0"),
        ("forward:some.csv", "forward:CSV,METHOD is expected"),
        ("linear:a", "scale schedule 'linear:a': could not convert string to float: 'a'"),
        ("interval:0.7,0.2", "low, high: 0.7, 0.2 are not 0 <= low <= high <= 1"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(ValueError) as error:
        parse(spec)
    assert message in str(error.value)
