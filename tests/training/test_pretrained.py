"""A pretrained model in the place of a trained one: every layout opens, misfits are refused, the pipeline goes on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import (
    BALLS,
    TINY_SIZE,
    TINY_STEPS,
    logged_inputs,
    toy_settings,
    track_without_a_store,
    write_balls,
    write_tiny_pipeline,
)

from nrcg.cli import main
from nrcg.config import ScheduleConfig
from nrcg.csv_files import read_csv
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_scheduler
from nrcg.errors import ConfigError, DataError
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.training.pretrained import check_pretrained, open_pretrained

ROOT = Path(__file__).parents[2]
SCHEDULE = {"num_train_timesteps": TINY_STEPS, "beta_start": 0.02, "beta_end": 0.8}

# The U-Net of google/ddpm-celebahq-256, as its config.json has it.
CELEBAHQ_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "center_input_sample": False,
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
CELEBAHQ_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "timestep_values": None,
    "trained_betas": None,
    "variance_type": "fixed_small",
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NRCG_TRACKING", "off")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_balls(tmp_path_factory.mktemp("data") / "data", 12, 6, TINY_SIZE)


def old_attention_names(weights: dict) -> dict:
    """The names that diffusers gave an attention's weights when the first models were published."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, value in weights.items():
        for new, old in names.items():
            if ".attentions." in name:
                name = name.replace(f".{new}.", f".{old}.")
        found[name] = value
    return found


def write_old_layout(folder: Path, unet: torch.nn.Module, unet_config: dict, scheduler_config: dict) -> None:
    """Everything at the top, weights as .bin: the hub's oldest models look like this."""
    folder.mkdir(parents=True)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(unet_config))
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler_config))
    torch.save(old_attention_names(unet.state_dict()), folder / "diffusion_pytorch_model.bin")


def as_old_layout(folder: Path, new: Path) -> None:
    pipe = GuidedDDPMPipeline.from_pretrained(folder)
    write_old_layout(new, pipe.unet, dict(pipe.unet.config), dict(pipe.scheduler.config))


def config_file(tmp_path: Path, pretrained: str, **schedule: object) -> Path:
    """toy.yaml with a pretrained model."""
    dataset = {"image_size": TINY_SIZE, "name": "tinyballs"}
    raw = toy_settings(dataset=dataset, ddpm={"pretrained": pretrained, "schedule": SCHEDULE | schedule})
    path = tmp_path / "toy.yaml"
    path.write_text(json.dumps(raw))
    return path


def train_ddpm(tmp_path: Path, pretrained: str, data: Path, out: Path, **schedule: object) -> int:
    path = config_file(tmp_path, pretrained, **schedule)
    step = ("--config", str(path), "--experiment", "toy", "--data", str(data))
    return main(["train-ddpm", *step, "--out", str(out), "--threads", "1"])


def check(folder: Path, **changes: object) -> None:
    pipe, _ = open_pretrained(str(folder))
    settings = {"schedule": ScheduleConfig(**SCHEDULE), "image_size": TINY_SIZE, "channels": 3, "source": "it"}
    check_pretrained(pipe, **settings | changes)


# --- Opening ----------------------------------------------------------------------------------------------------


def test_the_old_layout_is_the_same_model(tmp_path):
    new = write_tiny_pipeline(tmp_path / "new")
    as_old_layout(new, tmp_path / "old")
    assert "mid_block.attentions.0.query.weight" in torch.load(
        tmp_path / "old" / "diffusion_pytorch_model.bin", weights_only=True
    )
    pipes = [open_pretrained(str(tmp_path / name))[0] for name in ("old", "new")]
    samples = [pipe(num_samples=2, seed=0, on_step=lambda done: None).samples for pipe in pipes]
    assert torch.equal(*samples)


def test_weights_that_run_code_are_refused(tmp_path):
    as_old_layout(write_tiny_pipeline(tmp_path / "new"), tmp_path / "old")

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv_in.weight": Touch()}, tmp_path / "old" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="damaged"):
        open_pretrained(str(tmp_path / "old"))
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_nowhere_is_one_line():
    with pytest.raises(DataError, match="nobody/nothing: no such folder, and not to be had from the hub") as caught:
        open_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_opened_with_its_commit(tmp_path, monkeypatch):
    """From the hub's cache, without a network: what `huggingface_hub` leaves after a download."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--faces"
    as_old_layout(write_tiny_pipeline(tmp_path / "new"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    # Read from the environment when the library is loaded.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("somebody/faces", f"somebody/faces@{commit}"):
        pipe, origin = open_pretrained(source)
        assert pipe.unet.config.sample_size == TINY_SIZE
        assert origin == {"source": "somebody/faces", "revision": commit}


# --- What fits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"variance_type": "fixed_large", "clip_sample": False},
    ],
    ids=str,
)
def test_a_model_that_fits_is_taken(tmp_path, scheduler):
    folder = write_tiny_pipeline(tmp_path / "ddpm", **scheduler)
    names = {key: value for key, value in scheduler.items() if key == "beta_schedule"}
    check(folder, schedule=ScheduleConfig(**SCHEDULE | names))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedules_are_those_of_diffusers(beta_schedule):
    """Tolerance: diffusers computes betas in float32."""
    schedule = ScheduleConfig(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=beta_schedule)
    expected = torch.cumprod(1 - build_scheduler(schedule).betas.double(), 0)
    torch.testing.assert_close(Schedule.from_config(schedule).abar[1:], expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "changes", "text"),
    [
        ({}, {"image_size": 16}, f"dataset.image_size: 16, but it .* makes images of {TINY_SIZE}"),
        ({}, {"channels": 1}, "has 3 channels, the data set 1"),
        (
            {"beta_end": 0.7},
            {},
            f"ddpm.schedule: differs .* write num_train_timesteps: {TINY_STEPS}, beta_start: 0.02, beta_end: 0.7, "
            "beta_schedule: linear",
        ),
        ({"num_train_timesteps": 7}, {}, "write num_train_timesteps: 7"),
        ({"beta_schedule": "scaled_linear"}, {}, "beta_schedule: scaled_linear"),
        ({"beta_schedule": "sigmoid"}, {}, r"its betas \(sigmoid\) cannot be stated there; allowed: linear, "),
        ({"variance_type": "fixed_small_log"}, {}, "variance_type 'fixed_small_log' is not supported"),
        ({"variance_type": "learned_range"}, {}, "3 channels go in, 3 come out"),
        ({"thresholding": True}, {}, "thresholding True is not supported"),
    ],
)
def test_a_misfit_is_one_line_that_says_what_to_write(tmp_path, scheduler, changes, text):
    folder = write_tiny_pipeline(tmp_path / "ddpm", **scheduler)
    with pytest.raises(ConfigError, match=text) as caught:
        check(folder, **changes)
    assert "\n" not in str(caught.value)


def test_a_class_conditional_model_is_refused(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "ddpm")
    settings = json.loads((folder / "unet" / "config.json").read_text())
    from diffusers import UNet2DModel

    UNet2DModel.from_config(settings | {"num_class_embeds": 3}).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match="is conditional on a class"):
        check(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = write_tiny_pipeline(tmp_path / "ddpm")
    pipe = GuidedDDPMPipeline.from_pretrained(folder)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, math.nan)
    pipe.save_pretrained(folder)
    with pytest.raises(ConfigError, match="its weights hold values that are not finite"):
        check(folder)


# --- In the place of a training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_verb_takes_it_in_the_trained_ones_place(tmp_path, data, prediction_type, monkeypatch):
    track_without_a_store(monkeypatch, tmp_path)
    source, out = tmp_path / "source", tmp_path / "models" / "toy" / "ddpm"
    as_old_layout(write_tiny_pipeline(tmp_path / "new", prediction_type=prediction_type), source)
    assert train_ddpm(tmp_path, str(source), data, out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["ddpm"]
    # What the rule train_ddpm promises.
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "samples.png"):
        assert (out / name).stat().st_size > 0
    theirs, ours = (GuidedDDPMPipeline.from_pretrained(folder) for folder in (source, out))
    for name, value in theirs.unet.state_dict().items():
        assert torch.equal(value, ours.unet.state_dict()[name])
    assert ours.scheduler.config.prediction_type == prediction_type
    assert ours.data_mean.shape == (3, TINY_SIZE, TINY_SIZE)
    record = json.loads((out / "training.json").read_text())
    assert record["pretrained"] == {"source": str(source), "revision": None}
    assert len(record["sha256"]) == 64
    (row,) = read_csv(out / "training.csv", ("epoch", "train_loss"))
    assert (row["epoch"], math.isnan(row["train_loss"])) == (0, True)
    assert 0 < row["val_loss"] < 10  # an untrained network's
    name = json.loads((data / "dataset.json").read_text())["name"]
    images = [(f"{name}/train", "mean image"), (f"{name}/val", "validation")]
    assert logged_inputs(tmp_path) == [*images, ("ddpm",)]


def test_the_loss_of_a_known_network_is_right(tmp_path, data):
    """A U-Net that says 0: predicting eps its loss is the noise's variance, 1 (768 numbers of 6 images give a standard
    error of 0.02). Predicting v it says eps = sqrt(1 - abar_t) x_t, another loss."""
    losses = {}
    for kind in ("epsilon", "v_prediction"):
        folder = write_tiny_pipeline(tmp_path / f"source-{kind}", prediction_type=kind)
        pipe = GuidedDDPMPipeline.from_pretrained(folder)
        torch.nn.init.zeros_(pipe.unet.conv_out.weight)
        torch.nn.init.zeros_(pipe.unet.conv_out.bias)
        pipe.save_pretrained(folder)
        out = tmp_path / kind
        assert train_ddpm(tmp_path, str(folder), data, out) == 0
        losses[kind] = read_csv(out / "training.csv", ("epoch",))[0]["val_loss"]
    assert losses["epsilon"] == pytest.approx(1.0, abs=0.15)
    assert abs(losses["v_prediction"] - losses["epsilon"]) > 0.05


def test_a_misfit_leaves_no_folder(tmp_path, data, capsys):
    source, out = write_tiny_pipeline(tmp_path / "source"), tmp_path / "models" / "ddpm"
    assert train_ddpm(tmp_path, str(source), data, out, beta_end=0.5) == 1
    said = capsys.readouterr().err
    assert said.startswith("nrcg: ddpm.schedule: differs") and said.count("\n") == 1
    assert not out.exists()


def test_the_report_says_where_it_came_from(tmp_path, data):
    from nrcg.report.sections import training_record

    source, out = write_tiny_pipeline(tmp_path / "source"), tmp_path / "ddpm"
    assert train_ddpm(tmp_path, str(source), data, out) == 0
    found = training_record(out)
    assert found["loss"] is None
    assert found["words"].startswith(f"pretrained ({source}), not trained here, validation loss ")
    assert found["samples"] is not None


# --- The published model's size ---------------------------------------------------------------------------------


def peak_memory_gib(*arguments: object) -> float:
    """Run the command in a process of its own; its peak memory."""
    process = subprocess.Popen([sys.executable, "-m", "nrcg.cli", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_published_256_pixel_model_goes_through_sampling_and_evaluation(tmp_path, monkeypatch):
    """A folder of exactly the configuration of google/ddpm-celebahq-256 with random weights, through the verbs: take it
    in, sample with guidance through x0hat, evaluate."""
    from diffusers import UNet2DModel

    from nrcg.classifiers.architectures import SmallCNN
    from nrcg.classifiers.storage import save_classifier

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(CELEBAHQ_UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 113_673_219
    write_old_layout(tmp_path / "celebahq", unet, CELEBAHQ_UNET, CELEBAHQ_SCHEDULER)
    del unet
    write_balls(tmp_path / "data", 24, 1, 256, diameter=(0.3, 0.7))
    for role in ("judge", "non_robust"):
        save_classifier(
            tmp_path / "classifiers" / role,
            SmallCNN(3),
            {"architecture": "small_cnn", "classes": BALLS, "image_size": 256, "batch_norm_momentum": 0.1},
        )
    schedule = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    dataset = {"image_size": 256, "name": "balls256"}
    raw = toy_settings(dataset=dataset, ddpm={"pretrained": "celebahq", "schedule": schedule})
    (tmp_path / "toy.yaml").write_text(json.dumps(raw))
    step = ("--config", "toy.yaml", "--experiment", "toy", "--data", "data")
    peaks = [peak_memory_gib("train-ddpm", *step, "--out", "ddpm")]
    assert json.loads((tmp_path / "ddpm" / "unet" / "config.json").read_text())["sample_size"] == 256
    assert (tmp_path / "ddpm" / "samples.png").exists()

    guided = (
        "--classifier",
        "classifiers/non_robust",
        "--target",
        "baseball",
        "--scale",
        10,
        "--stabilizer",
        "ema:0.99",
    )
    drawn = ("--sampler", "ddim", "--steps", 2, "--num-samples", 6, "--batch-size", 1, "--out", "drawn")
    peaks.append(peak_memory_gib("sample", "--ddpm", "ddpm", *guided, *drawn))
    samples = np.load(tmp_path / "drawn" / "samples.npy")
    assert (samples.shape, samples.dtype) == ((6, 256, 256, 3), np.uint8)
    record = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    assert record["nonfinite"] == 0

    judged = ("--features", "judge", "--classifier", "classifiers/judge")
    sides = ("--samples", "drawn", "--reference", "data/train/images.npy")
    peaks.append(peak_memory_gib("evaluate", *sides, *judged, "--out", "metrics.json"))
    row = json.loads((tmp_path / "metrics.json").read_text())
    assert (row["num_samples"], row["num_reference"]) == (6, 24)
    assert row["fd_judge"] > 0
    assert max(peaks) < 8
