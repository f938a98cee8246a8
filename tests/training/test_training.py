"""Training: it learns, it resumes as if nothing had happened, and it writes what others can open."""

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from training_job import (
    CPU,
    DDPM,
    NUM_IMAGES,
    SCHEDULE,
    SIZE,
    VAL,
    Killed,
    assert_almost_same_weights,
    train_classifier,
    train_ddpm,
)

from nrcg.config import DDPMConfig
from nrcg.diffusion import storage
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_scheduler, build_unet
from nrcg.errors import ConfigError, DataError
from nrcg.training import ddpm, trainer
from nrcg.training.classifier import accuracy, accuracy_over_t
from nrcg.training.distributed import Ranks
from nrcg.training.trainer import Checkpoint

STEPS_PER_EPOCH = NUM_IMAGES // DDPM["batch_size"]


def killer(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Killed

    return on_step


def comparable(log: list[dict]) -> list[dict]:
    """The rows without how fast it went."""
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in log]


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "ddpm.checkpoint.pt"
    return train_ddpm(Checkpoint(path, "a", minutes=60))


# --- The diffusion model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2, 3 * STEPS_PER_EPOCH],
    ids=["first", "an epoch's end", "in the second epoch", "last"],
)
def test_a_killed_training_resumes_as_if_nothing_had_happened(tmp_path, undisturbed, step):
    """Exactly: every random choice depends on (seed, step), and a checkpoint holds all state in full precision."""
    path = tmp_path / "ddpm.checkpoint.pt"
    # The kill comes after the step's checkpoint: `on_step` of the next one.
    if step < 3 * STEPS_PER_EPOCH:
        with pytest.raises(Killed):
            train_ddpm(Checkpoint(path, "a", minutes=1e-9), on_step=killer(step + 1))
    else:

        def killed(row: dict) -> None:
            if row["epoch"] == 3:
                raise Killed

        with pytest.raises(Killed):
            train_ddpm(Checkpoint(path, "a", minutes=1e-9), on_epoch=killed)
    assert torch.load(path, weights_only=True)["trainer"]["step"] == step
    done = []
    unet, log = train_ddpm(Checkpoint(path, "a", minutes=60), on_step=done.append)
    assert done == list(range(step + 1, 3 * STEPS_PER_EPOCH + 1))
    assert_same_weights(unet, undisturbed[0])
    assert comparable(log) == comparable(undisturbed[1])


def test_dropout_resumes_too(tmp_path):
    config = copy.deepcopy(DDPM) | {"epochs": 1}
    config["unet"]["dropout"] = 0.3
    whole, _ = train_ddpm(Checkpoint(tmp_path / "a.pt", "a", minutes=60), config)
    with pytest.raises(Killed):
        train_ddpm(Checkpoint(tmp_path / "b.pt", "a", minutes=1e-9), config, on_step=killer(4))
    resumed, _ = train_ddpm(Checkpoint(tmp_path / "b.pt", "a", minutes=60), config)
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_resumes_too(tmp_path, precision):
    """float16 also keeps its loss scale."""
    config = DDPM | {"epochs": 1}
    whole, log = train_ddpm(Checkpoint(tmp_path / "a.pt", "a", minutes=60), config, precision)
    with pytest.raises(Killed):
        train_ddpm(Checkpoint(tmp_path / "b.pt", "a", minutes=1e-9), config, precision, on_step=killer(4))
    scaler = torch.load(tmp_path / "b.pt", weights_only=True)["trainer"]["scaler"]
    assert bool(scaler) == (precision == torch.float16)
    resumed, again = train_ddpm(Checkpoint(tmp_path / "b.pt", "a", minutes=60), config, precision)
    assert_same_weights(whole, resumed)
    assert comparable(log) == comparable(again)


@pytest.mark.parametrize("micro_batch_size", [3, 100])
def test_micro_batches_change_the_result_by_rounding_alone(tmp_path, undisturbed, micro_batch_size):
    """Tolerances as for several processes; sizes that do not divide the batch count each image once."""
    config = DDPM | {"micro_batch_size": micro_batch_size}
    unet, log = train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), config)
    for ours, theirs in zip(comparable(log), comparable(undisturbed[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert_almost_same_weights(unet.state_dict(), undisturbed[0].state_dict())


def test_no_more_images_than_a_micro_batch_go_through_the_unet(tmp_path, monkeypatch):
    seen = []
    output = ddpm.unet_output

    def spy(unet, x_t, *rest):
        seen.append(len(x_t))
        return output(unet, x_t, *rest)

    monkeypatch.setattr(ddpm, "unet_output", spy)
    train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), DDPM | {"micro_batch_size": 3, "epochs": 1})
    assert seen == [3, 3, 2] * STEPS_PER_EPOCH + [3, 3, 2, 3, 1]  # of 12 validation images


@pytest.mark.parametrize("error", ["the CPU's allocator", "CUDA's", "another"])
def test_out_of_memory_names_the_key(tmp_path, monkeypatch, error):
    def fail(*arguments: object) -> None:
        if error == "the CPU's allocator":
            torch.empty(2**60, dtype=torch.uint8)
        if error == "CUDA's":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        raise RuntimeError("something else")

    monkeypatch.setattr(ddpm, "unet_output", fail)
    expected, text = (RuntimeError, "something else") if error == "another" else (DataError, "ddpm.micro_batch_size: ")
    with pytest.raises(expected, match=text) as caught:
        train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), DDPM | {"micro_batch_size": 5})
    if error != "another":
        assert "5 images at once on cpu" in str(caught.value)


def test_more_processes_than_images_are_refused(tmp_path):
    class Nine(Ranks):
        count = 9

        def __init__(self) -> None:
            self.rank, self._accelerator = 0, None

    with pytest.raises(ConfigError, match="9 processes cannot share a batch of 8 images"):
        train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), ranks=Nine())


@pytest.mark.parametrize("kind", ["foreign", "cut off", "no checkpoint", "a list", "missing"])
def test_a_checkpoint_that_does_not_fit_is_left_aside(tmp_path, capsys, kind):
    path = tmp_path / "ddpm.checkpoint.pt"
    checkpoint = Checkpoint(path, "a", minutes=60)
    checkpoint.save({"trainer": {"step": 1}})
    if kind == "foreign":
        checkpoint = Checkpoint(path, "b", minutes=60)
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no checkpoint":
        path.write_text("no checkpoint")
    elif kind == "a list":
        torch.save([1], path)
    else:
        checkpoint.remove()
    assert checkpoint.load() is None
    said = capsys.readouterr().out
    assert (said == "") if kind == "missing" else ("training starts anew" in said and said.count("\n") == 1)


def test_a_checkpoint_is_written_as_a_whole(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c.pt", "a", minutes=60)
    checkpoint.save({"step": 1})

    def half(state: dict, path) -> None:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            checkpoint.save({"step": 2})
    assert checkpoint.load()["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_falls(tmp_path, precision):
    """Direction of effect on a tiny data set: both losses fall by a tenth at least."""
    _, log = train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), DDPM | {"epochs": 7}, precision)
    for loss in ("train_loss", "val_loss"):
        assert log[-1][loss] < 0.9 * log[0][loss]


def test_the_log_has_a_row_per_epoch(undisturbed):
    _, log = undisturbed
    columns = {"epoch", "step", "train_loss", "val_loss", "learning_rate", "images_per_second"}
    assert [set(row) for row in log] == [columns] * 3
    assert [(row["epoch"], row["step"]) for row in log] == [(1, 5), (2, 10), (3, 15)]
    assert log[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)  # the cosine ends at zero
    assert all(row["images_per_second"] > 0 for row in log)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_averaged_weights_are_what_is_returned(tmp_path, decay):
    """EMA by hand over the weights of each step; at decay 0 they are the last step's own.

    Tolerance 1e-6: the average is taken in float32 in another order.
    """
    config = DDPM | {"ema_decay": decay, "epochs": 1}
    path = tmp_path / "c.pt"
    average = None

    def follow(done: int) -> None:
        # The checkpoint on disk is the step before's; all but the last step are seen here.
        nonlocal average
        if done > 1:
            average = step_average(average, path, done - 1)

    def step_average(before: dict | None, path, step: int) -> dict:
        weights = torch.load(path, weights_only=True)["trainer"]["module"]
        # diffusers' warm-up of the decay: min(decay, (1 + n) / (10 + n)) with n steps before.
        share = min(decay, step / (9 + step)) if step > 1 else 0.0
        start = before if before is not None else weights
        return {name: share * start[name] + (1 - share) * weights[name] for name in weights}

    unet, _ = train_ddpm(Checkpoint(path, "a", minutes=1e-9), config, on_step=follow)
    expected = step_average(average, path, STEPS_PER_EPOCH)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    last = torch.load(path, weights_only=True)["trainer"]["module"]["conv_in.weight"]
    assert torch.equal(unet.state_dict()["conv_in.weight"], last) == (decay == 0.0)


def test_the_validation_loss_is_the_same_at_every_call():
    torch.manual_seed(0)
    unet = build_unet(DDPMConfig(**DDPM).unet, SIZE, 3).eval()

    def loss(seed: int, batch_size: int) -> float:
        torch.manual_seed(seed)
        return ddpm.ddpm_validation_loss(unet, SCHEDULE, VAL, 12, batch_size, torch.float32)

    assert loss(0, 5) == loss(1, 5)
    # An untrained network predicts almost nothing, so the loss is near the noise's variance of 1.
    assert loss(0, 5) == pytest.approx(1.0, abs=0.5)


def test_sample_grids_are_due_within_training_not_at_its_end(tmp_path):
    due = []
    train_ddpm(
        Checkpoint(tmp_path / "c.pt", "a", 60),
        DDPM | {"sample_every": 1},
        on_samples=lambda unet, epoch: due.append((epoch, unet.training)),
    )
    assert due == [(1, False), (2, False)]


def test_training_steps_draw_every_t_from_1_to_T():
    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return trainer.step_noise(0, step, (500, 1, 2, 2), 10, CPU)

    t, noise = draw(0)
    assert sorted(set(t.tolist())) == list(range(1, 11))
    assert not torch.equal(noise, draw(1)[1])
    assert torch.equal(noise, draw(0)[1])
    # 2000 standard normal numbers: the mean's standard error is 0.022, the standard deviation's 0.016.
    assert noise.mean().item() == pytest.approx(0, abs=0.1)
    assert noise.std().item() == pytest.approx(1, abs=0.07)


def test_the_saved_pipeline_opens_with_diffusers(tmp_path, undisturbed):
    from diffusers import DDPMPipeline

    from nrcg.guidance.pipeline import GuidedDDPMPipeline

    unet, log = undisturbed
    scheduler, mean = build_scheduler(DDPMConfig(**DDPM).schedule), np.full((3, SIZE, SIZE), 0.25)
    folder = tmp_path / "models" / "ddpm"
    for _ in range(2):  # an old folder is replaced as a whole
        storage.save_pipeline(folder, unet, scheduler, mean, {"who": "a test"}, log)
        (folder / "stale").write_text("")
    storage.save_pipeline(folder, unet, scheduler, mean, {"who": "a test"}, log)
    assert not (folder / "stale").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["ddpm"]
    pipe = DDPMPipeline.from_pretrained(folder)
    assert_same_weights(pipe.unet, unet)
    assert pipe.scheduler.config.num_train_timesteps == 10
    assert (pipe.scheduler.config.variance_type, pipe.scheduler.config.clip_sample) == ("fixed_small", True)
    torch.testing.assert_close(Schedule.from_scheduler(pipe.scheduler).abar, SCHEDULE.abar, atol=1e-6, rtol=1e-5)
    stored = np.load(folder / "data_mean.npy")
    assert (stored.dtype, stored.shape) == (np.float32, (3, SIZE, SIZE))
    assert torch.equal(GuidedDDPMPipeline.from_pretrained(folder).data_mean, torch.from_numpy(stored))
    record = json.loads((folder / "training.json").read_text())
    assert record["who"] == "a test"
    assert len(record["sha256"]) == 64
    assert (folder / "training.csv").read_text().count("\n") == 4


# --- Classifiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noised", [False, True])
def test_a_classifier_learns_a_trivial_data_set(noised):
    classifier, log = train_classifier(noised=noised)
    assert log[-1]["val_accuracy"] == 1.0
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert accuracy(classifier, VAL) == 1.0
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_classifiers_are_a_function_of_their_seed():
    first, again, other = (train_classifier(epochs=1, seed=seed)[0] for seed in (0, 0, 1))
    assert_same_weights(first, again)
    assert not torch.equal(first.module.head.weight, other.module.head.weight)


@pytest.mark.parametrize(
    ("architecture", "step"), [("small_cnn", 6), ("mobilenet_v3_small", 1), ("mobilenet_v3_small", 4)]
)
def test_a_killed_classifiers_training_resumes_as_if_nothing_had_happened(tmp_path, architecture, step):
    """Exactly. An epoch has four steps; MobileNetV3 has dropout and running statistics."""
    changes = {"architecture": architecture, "noised": True, "epochs": 2}
    whole, log = train_classifier(**changes)
    with pytest.raises(Killed):
        train_classifier(Checkpoint(tmp_path / "c.pt", "a", minutes=1e-9), killer(step + 1), **changes)
    torch.manual_seed(99)  # another process's generator
    done = []
    resumed, again = train_classifier(Checkpoint(tmp_path / "c.pt", "a", minutes=60), done.append, **changes)
    assert done == list(range(step + 1, 9))
    assert again == log
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("noised", [False, True])
def test_only_the_robust_classifier_sees_noise_at_t_from_1_to_T(monkeypatch, noised):
    seen = []
    q_sample = Schedule.q_sample

    def spy(self, x0, t, noise):
        seen.append(t)
        return q_sample(self, x0, t, noise)

    monkeypatch.setattr(Schedule, "q_sample", spy)
    train_classifier(noised=noised, epochs=8)
    if not noised:
        assert seen == []
        return
    steps = torch.cat(seen)
    assert len(steps) == 8 * NUM_IMAGES
    assert sorted(set(steps.tolist())) == list(range(1, SCHEDULE.num_steps + 1))
    assert all(len(set(t.tolist())) > 1 for t in seen)  # each image at its own t


def test_accuracy_over_t_goes_from_clean_images_to_T():
    classifier, _ = train_classifier()
    rows = accuracy_over_t(classifier, SCHEDULE, VAL, num_points=6)
    assert [row["t"] for row in rows] == [0, 2, 4, 6, 8, 10]
    assert rows[0]["accuracy"] == accuracy(classifier, VAL)
    assert rows == accuracy_over_t(classifier, SCHEDULE, VAL, num_points=6)
