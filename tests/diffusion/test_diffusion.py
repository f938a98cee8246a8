"""Schedule, forward process and posterior against diffusers, Bayes' rule and numbers worked out by hand."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg import devices
from nrcg.config import ScheduleConfig, UNetConfig
from nrcg.devices import resolve_device, resolve_precision
from nrcg.diffusion import storage
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.storage import read_data_mean
from nrcg.diffusion.unet import build_scheduler, build_unet
from nrcg.errors import DataError

PUBLISHED = ScheduleConfig(num_train_timesteps=400, beta_start=1e-4, beta_end=0.02)
SCHEDULES = [PUBLISHED, ScheduleConfig(num_train_timesteps=50, beta_start=1e-3, beta_end=0.3)]


# --- schedule --------------------------------------------------------------------------------------------------------


def test_published_schedule_ends_at_the_published_abar():
    schedule = Schedule.from_config(PUBLISHED)
    assert schedule.num_steps == 400
    assert float(schedule.abar[0]) == 1.0
    # 0.0175 and 7.6 are published to these digits: half a unit of the last one.
    assert float(schedule.abar[400]) == pytest.approx(0.0175, abs=5e-5)
    assert float(schedule.abar[400]) ** -0.5 == pytest.approx(7.6, abs=0.05)


def test_abar_by_hand():
    abar = Schedule.linear(3, 0.1, 0.3).abar
    # 1, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7 in float64.
    assert abar.tolist() == pytest.approx([1.0, 0.9, 0.72, 0.504], rel=1e-14)


@pytest.mark.parametrize("config", SCHEDULES)
def test_abar_equals_diffusers(config):
    scheduler = build_scheduler(config)
    ours = Schedule.from_config(config).abar[1:]
    # diffusers multiplies in float32: T roundings of 6e-8.
    torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=0)
    torch.testing.assert_close(Schedule.from_scheduler(scheduler).abar[1:], ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [[0.1, 0.2]], [0.1, float("nan")]])
def test_betas_out_of_range_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas.*\(0, 1\)"):
        Schedule(torch.tensor(betas))


# --- forward process and its inverse ---------------------------------------------------------------------------------


def test_q_sample_by_hand():
    schedule = Schedule(torch.tensor([0.36, 0.75], dtype=torch.float64))  # abar 0.64, 0.16
    x0, noise = torch.tensor([[[[1.0, -0.5]]]]), torch.tensor([[[[0.5, 2.0]]]])
    expected = torch.tensor([[[[0.8 + 0.3, -0.4 + 1.2]]]])
    torch.testing.assert_close(schedule.q_sample(x0, 1, noise), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(schedule.q_sample(x0, 0, noise), x0)


@pytest.mark.parametrize("config", SCHEDULES)
def test_q_sample_equals_diffusers(config):
    schedule, scheduler = Schedule.from_config(config), build_scheduler(config)
    x0, noise = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(1, config.num_train_timesteps, 8).long()
    # float32 abar near 1 leaves 1 - abar with a relative error of 6e-8 / beta_1.
    torch.testing.assert_close(
        schedule.q_sample(x0, t, noise), scheduler.add_noise(x0, noise, t - 1), rtol=0, atol=2e-5
    )


@settings(max_examples=25, deadline=None)
@given(t=st.lists(st.integers(0, 400), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_pred_x0_undoes_q_sample(t, seed):
    schedule = Schedule.from_config(PUBLISHED)
    x0, noise = torch.randn(2, len(t), 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    steps = torch.tensor(t)
    # float64 rounding, amplified by 1 / sqrt(abar_T) = 7.6.
    x_t = schedule.q_sample(x0, steps, noise)
    torch.testing.assert_close(schedule.pred_x0(x_t, noise, steps), x0, rtol=0, atol=1e-12)


def test_steps_of_a_batch_may_differ():
    schedule = Schedule.from_config(PUBLISHED)
    x0, noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    together = schedule.q_sample(x0, torch.tensor([1, 200, 400]), noise)
    for i, t in enumerate((1, 200, 400)):
        assert torch.equal(together[i : i + 1], schedule.q_sample(x0[i : i + 1], t, noise[i : i + 1]))


# --- posterior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, t_prev", [(400, 399), (2, 1), (200, 199), (400, 300), (10, 3)])
def test_posterior_is_bayes_rule(t, t_prev):
    """q(x_prev | x_t, x_0) as the product of the Gaussians q(x_t | x_prev) and q(x_prev | x_0)."""
    schedule = Schedule.from_config(PUBLISHED)
    abar, abar_prev = float(schedule.abar[t]), float(schedule.abar[t_prev])
    alpha = abar / abar_prev
    precision = alpha / (1 - alpha) + 1 / (1 - abar_prev)
    expected = (
        abar_prev**0.5 / (1 - abar_prev) / precision,
        alpha**0.5 / (1 - alpha) / precision,
        1 / precision,
    )
    # float64; 1 - abar cancels up to four digits.
    assert schedule.posterior(t, t_prev) == pytest.approx(expected, rel=1e-10)


def test_posterior_defaults_to_the_next_step_and_ends_without_noise():
    schedule = Schedule.from_config(PUBLISHED)
    assert schedule.posterior(7) == schedule.posterior(7, 6)
    assert schedule.posterior(1) == pytest.approx((1.0, 0.0, 0.0), abs=1e-15)
    assert schedule.posterior(9, 0) == pytest.approx((1.0, 0.0, 0.0), abs=1e-15)


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_posterior_equals_diffusers_step(config, share, monkeypatch):
    schedule, scheduler = Schedule.from_config(config), build_scheduler(config)
    t = max(1, round(share * config.num_train_timesteps))
    x_t, eps, noise = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(t))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    expected = scheduler.step(eps, t - 1, x_t)
    x0 = schedule.pred_x0(x_t, eps, t).clamp(-1, 1)
    # diffusers works in float32 from cumulated products; 1 - abar_1 = 1e-4 leaves four to five digits.
    torch.testing.assert_close(x0, expected.pred_original_sample, rtol=0, atol=2e-4)
    a, b, variance = schedule.posterior(t)
    ours = a * x0 + b * x_t + variance**0.5 * noise
    torch.testing.assert_close(ours, expected.prev_sample, rtol=0, atol=2e-4)
    if t > 1:
        assert variance == pytest.approx(float(scheduler._get_variance(t - 1)), rel=2e-3)


def test_build_scheduler_says_what_the_sampler_expects():
    config = build_scheduler(PUBLISHED).config
    assert isinstance(build_scheduler(PUBLISHED), DDPMScheduler)
    assert (config.variance_type, config.prediction_type, config.clip_sample) == ("fixed_small", "epsilon", True)
    assert (config.num_train_timesteps, config.beta_start, config.beta_end) == (400, 1e-4, 0.02)


# --- the U-Net -------------------------------------------------------------------------------------------------------


def unet_config(**changes) -> UNetConfig:
    settings = {
        "block_out_channels": [8, 16],
        "attention": [False, True],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "dropout": 0.0,
    }
    return UNetConfig(**settings | changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_keeps_the_images_shape(channels):
    unet = build_unet(unet_config(), image_size=10, channels=channels)
    with torch.no_grad():
        assert unet(torch.zeros(2, channels, 10, 10), torch.tensor([0, 5])).sample.shape == (2, channels, 10, 10)


def test_attention_lies_where_the_config_marks_it():
    blocks = build_unet(unet_config(attention=[True, False]), image_size=8, channels=3).config
    assert list(blocks.down_block_types) == ["AttnDownBlock2D", "DownBlock2D"]
    assert list(blocks.up_block_types) == ["UpBlock2D", "AttnUpBlock2D"]


def test_published_unet_has_its_22_million_parameters():
    config = unet_config(
        block_out_channels=[64, 128, 192, 256],
        attention=[False, True, True, True],
        layers_per_block=2,
        norm_num_groups=32,
    )
    with torch.device("meta"):
        unet = build_unet(config, image_size=64, channels=3)
    # Published as 22.4 million: half a unit of the last digit.
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(22.4e6, abs=0.05e6)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(DataError, match=r"image_size: 10 cannot be halved 2 times; take a multiple of 4"):
        build_unet(unet_config(block_out_channels=[8, 8, 8], attention=[False] * 3), image_size=10, channels=3)


# --- data mean, device, precision ------------------------------------------------------------------------------------


def test_data_mean_is_read_where_it_is(tmp_path):
    assert read_data_mean(tmp_path) is None
    mean = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4)).astype(np.float32)
    np.save(tmp_path / storage.DATA_MEAN_FILE, mean)
    assert np.array_equal(read_data_mean(tmp_path).numpy(), mean)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"not an array"])
def test_a_damaged_data_mean_is_one_clear_line(tmp_path, content):
    (tmp_path / storage.DATA_MEAN_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"data_mean\.npy: cannot be read") as error:
        read_data_mean(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cut_off_data_mean_is_one_clear_line(tmp_path):
    path = tmp_path / storage.DATA_MEAN_FILE
    np.save(path, np.zeros((3, 8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"data_mean\.npy: cannot be read"):
        read_data_mean(tmp_path)


@pytest.mark.parametrize("there, expected", [(True, "cuda"), (False, "cpu")])
def test_auto_device(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device, count", [("cuda", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DataError, match=f"device: {device} is not there; {count} CUDA devices"):
        resolve_device(device)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("device, training", [("cpu", False), ("cpu", True), ("cuda", True)])
def test_auto_precision_is_bfloat16_where_the_device_computes_in_it(monkeypatch, device, training, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    assert resolve_precision("auto", torch.device(device), training=training) == expected


def test_a_gpu_samples_in_float16():
    assert resolve_precision("auto", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_precision_is_taken(name):
    assert resolve_precision(name, torch.device("cpu")) == getattr(torch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_parameters_alone(dtype):
    layer = torch.nn.Linear(2, 2)
    with devices.autocast(torch.device("cpu"), dtype):
        assert layer(torch.zeros(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32
