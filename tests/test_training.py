"""Training: it learns, it resumes as if nothing had happened, and it writes what others can open."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nrcg import training
from nrcg.config import ClassifierConfig, DDPMConfig
from nrcg.diffusion import Schedule, build_scheduler, build_unet
from nrcg.loading import Images, epoch_batches, steps_per_epoch
from nrcg.training import Checkpoint, accuracy, accuracy_over_t

CPU = torch.device("cpu")
SIZE = 8
NUM_IMAGES = 40
OPTIMIZER = {"learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.01, "grad_clip": 1.0}
DDPM = {
    "schedule": {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.6},
    "unet": {
        "block_out_channels": [4, 8],
        "attention": [False, True],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "dropout": 0.0,
    },
    "epochs": 3,
    "batch_size": 8,
    "optimizer": OPTIMIZER,
    "ema_decay": 0.9,
    "checkpoint_minutes": 1e-9,  # a checkpoint after every step
    "num_val_images": 12,
    "sample_every": 0,
    "seed": 0,
}
CLASSIFIER = {
    "architecture": "small_cnn",
    "noised": False,
    "epochs": 4,
    "batch_size": 10,
    "optimizer": OPTIMIZER | {"learning_rate": 1e-2},
    "batch_norm_momentum": 0.3,
    "seed": 0,
}
STEPS_PER_EPOCH = NUM_IMAGES // DDPM["batch_size"]


def bright_or_dark(num_images: int, seed: int = 0) -> Images:
    """Class 0 is dark, class 1 bright: a task that anything learns."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    pixels = rng.integers(0, 60, (num_images, SIZE, SIZE, 3)) + 180 * labels[:, None, None, None]
    return Images(pixels.astype(np.uint8), labels.astype(np.int64), CPU)


TRAIN, VAL = bright_or_dark(NUM_IMAGES), bright_or_dark(20, seed=1)
SCHEDULE = Schedule.linear(10, 0.01, 0.6)


class Killed(Exception):
    pass


def killer(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Killed

    return on_step


def train_ddpm(checkpoint: Checkpoint, config: dict = DDPM, **hooks):
    hooks = {"on_step": lambda done: None, "on_epoch": lambda row: None, "on_samples": lambda unet, epoch: None} | hooks
    return training.train_ddpm(
        DDPMConfig(**config),
        TRAIN,
        VAL,
        image_size=SIZE,
        channels=3,
        device=CPU,
        precision=torch.float32,
        checkpoint=checkpoint,
        **hooks,
    )


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


# --- Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "batch_size"), [(40, 8), (41, 8), (47, 8), (5, 8), (8, 8), (1, 1)])
def test_an_epoch_is_a_permutation_without_its_incomplete_batch(num_images, batch_size):
    batches = list(epoch_batches(num_images, batch_size, seed=3, epoch=2))
    assert len(batches) == steps_per_epoch(num_images, batch_size)
    assert {len(batch) for batch in batches} == {min(batch_size, num_images)}
    positions = torch.cat(batches).tolist()
    assert len(set(positions)) == len(positions)
    assert set(positions) <= set(range(num_images))


def test_an_epochs_order_is_a_function_of_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(list(epoch_batches(40, 8, seed, epoch))).tolist()

    first = order(0, 0)
    torch.manual_seed(99)
    torch.rand(7)
    assert order(0, 0) == first
    # From another process.
    assert torch.cat(list(epoch_batches(8, 8, 0, 0))).tolist() == [3, 6, 7, 0, 5, 2, 1, 4]
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_hold_the_images_asked_for_in_that_order():
    indices = torch.tensor([7, 0, 39, 8])
    x, labels = TRAIN.batch(indices)
    expected = TRAIN._array[indices.numpy()].transpose(0, 3, 1, 2) / 127.5 - 1
    # float32 against float64: a rounding of 1e-7 at values up to 1.
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert labels.tolist() == [1, 0, 1, 0]


# --- The diffusion model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2, 3 * STEPS_PER_EPOCH],
    ids=["first", "before an epoch's end", "an epoch's end", "in the second epoch", "last"],
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


def test_the_loss_falls(tmp_path):
    """Direction of effect on a tiny data set: both losses fall by a tenth at least (seen: more than a third)."""
    _, log = train_ddpm(Checkpoint(tmp_path / "c.pt", "a", minutes=60), DDPM | {"epochs": 12})
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
        return training.ddpm_validation_loss(unet, SCHEDULE, VAL, 12, batch_size, torch.float32)

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
        return training._step_noise(0, step, (500, 1, 2, 2), 10, CPU)

    t, noise = draw(0)
    assert sorted(set(t.tolist())) == list(range(1, 11))
    assert not torch.equal(noise, draw(1)[1])
    assert torch.equal(noise, draw(0)[1])
    # 2000 standard normal numbers: the mean's standard error is 0.022, the standard deviation's 0.016.
    assert noise.mean().item() == pytest.approx(0, abs=0.1)
    assert noise.std().item() == pytest.approx(1, abs=0.07)


def test_the_saved_pipeline_opens_with_diffusers(tmp_path, undisturbed):
    from diffusers import DDPMPipeline

    from nrcg.sampling import GuidedDDPMPipeline

    unet, log = undisturbed
    scheduler, mean = build_scheduler(DDPMConfig(**DDPM).schedule), np.full((3, SIZE, SIZE), 0.25)
    folder = tmp_path / "models" / "ddpm"
    for _ in range(2):  # an old folder is replaced as a whole
        training.save_pipeline(folder, unet, scheduler, mean, {"who": "a test"}, log)
        (folder / "stale").write_text("")
    training.save_pipeline(folder, unet, scheduler, mean, {"who": "a test"}, log)
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


def train_classifier(checkpoint: Checkpoint | None = None, on_step=lambda done: None, **changes):
    return training.train_classifier(
        ClassifierConfig(**CLASSIFIER | changes),
        SCHEDULE,
        TRAIN,
        VAL,
        num_classes=2,
        device=CPU,
        precision=torch.float32,
        checkpoint=checkpoint or Checkpoint(Path("never") / "written.pt", "a", minutes=60),
        on_step=on_step,
        on_epoch=lambda row: None,
    )


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
