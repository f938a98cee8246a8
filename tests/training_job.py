"""A training in processes of its own, to be killed. They are forked off a server that has loaded torch already."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nrcg.config import ClassifierConfig, DDPMConfig
from nrcg.diffusion.schedule import Schedule
from nrcg.training import classifier, ddpm, distributed, trainer
from nrcg.training.feed import TrainingImages

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
CPU = torch.device("cpu")
SCHEDULE = Schedule.linear(10, 0.01, 0.6)


def bright_or_dark(num_images: int, seed: int = 0) -> TrainingImages:
    """Class 0 is dark, class 1 bright: a task that anything learns."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    pixels = rng.integers(0, 60, (num_images, SIZE, SIZE, 3)) + 180 * labels[:, None, None, None]
    return TrainingImages(pixels.astype(np.uint8), labels.astype(np.int64), CPU)


def assert_almost_same_weights(a: dict, b: dict) -> None:
    """Together, not one by one: Adam divides a gradient that is nothing but rounding by its own size. Seen: 6e-4; with
    one wrong image in one batch 7e-3."""
    x, y = (torch.cat([value.flatten() for value in weights.values()]) for weights in (a, b))
    assert (x - y).norm() < 3e-3 * y.norm()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


TRAIN, VAL = bright_or_dark(NUM_IMAGES), bright_or_dark(20, seed=1)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training_job", "diffusers.training_utils", "diffusers.optimization", "accelerate"])


class Killed(Exception):
    """What ends a training of a test."""


def train_ddpm(
    checkpoint: trainer.Checkpoint,
    config: dict = DDPM,
    precision=torch.float32,
    ranks=None,
    device=CPU,
    compile="off",
    **hooks,
):
    return ddpm.train_unet(
        DDPMConfig(**config),
        TRAIN,
        VAL,
        image_size=SIZE,
        channels=3,
        device=device,
        precision=precision,
        checkpoint=checkpoint,
        hooks=ddpm.Hooks(**hooks),
        ranks=ranks,
        compile=compile,
    )


def train_classifier(
    checkpoint: trainer.Checkpoint | None = None, on_step=lambda done: None, device=CPU, compile="off", **changes
):
    return classifier.fit_classifier(
        ClassifierConfig(**CLASSIFIER | changes),
        SCHEDULE,
        TRAIN,
        VAL,
        num_classes=2,
        device=device,
        precision=torch.float32,
        checkpoint=checkpoint or trainer.Checkpoint(Path("never") / "written.pt", "a", minutes=60),
        compile=compile,
        on_step=on_step,
        on_epoch=lambda row: None,
    )


def _work(folder: Path, config: dict, checkpoint_minutes: float, environment: dict, steps) -> None:
    """One rank: train, and let the first one write what came out."""
    os.environ |= environment
    torch.set_num_threads(1)
    ranks, device = distributed.join(CPU)
    checkpoint = trainer.Checkpoint(folder / "checkpoint.pt", "a", checkpoint_minutes)

    def on_step(done: int) -> None:
        steps.value = done

    if "architecture" in config:
        model, log = train_classifier(checkpoint, on_step, device, **config)
    else:
        model, log = train_ddpm(checkpoint, config, ranks=ranks, device=device, on_step=on_step)
    ranks.leave()
    if ranks.main:
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(log))


@dataclass
class Job:
    """A training of one or several processes on the CPU; the same folder again resumes it."""

    folder: Path
    config: dict
    num_ranks: int = 1
    checkpoint_minutes: float = 1e-9
    processes: list = field(default_factory=list)

    def start(self) -> None:
        from torch.distributed import TCPStore

        self.folder.mkdir(exist_ok=True)
        self.steps = FORKS.Value("q", 0, lock=False)
        environment = {}
        if self.num_ranks > 1:
            self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(self.num_ranks),
            }
        self.processes = [
            FORKS.Process(
                target=_work,
                args=(
                    self.folder,
                    self.config,
                    self.checkpoint_minutes,
                    environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {},
                    self.steps,
                ),
            )
            for rank in range(self.num_ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> None:
        for process in self.processes:
            process.join(120)
            assert process.exitcode == 0

    def kill(self) -> None:
        """kill -9 of every process, at once."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join(30)

    def result(self) -> tuple[dict, list[dict]]:
        """Weights, and the log without how fast it went."""
        log = json.loads((self.folder / "log.json").read_text())
        rows = [{key: value for key, value in row.items() if key != "images_per_second"} for row in log]
        return torch.load(self.folder / "weights.pt", weights_only=True), rows
