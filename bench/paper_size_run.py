"""What paper_size.py runs on: settings, the clock, and what is remembered from call to call."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

EXPERIMENT, TARGET = "sportballs", "baseball"
BUDGETS = {"train": 5.0, "sweep": 3.5, "best": 2.0, "forward": 1.3, "speed": 3.0}
"""Stage -> minutes, in their order."""
COMPARED = ("unconditional", "robust", "non_robust_x0_ema99")
ROLES = ("non_robust", "robust", "judge")
START_SECONDS = 40.0
"""Of a training that are no training: drawing its images, imports, the first step, the grid of samples, the export."""
MARGIN = 0.85
"""Share of the measured speed that a training is planned with: the classifiers are trained beside it."""
SKIPPED = 0.6
"""What a step costs with `skip_above` 0.9, against one that always takes the gradient; a first guess of the pace."""

SETTINGS: dict = {
    "description": "SportBalls at 64 x 64 pixels, the paper's U-Net trained for minutes on one GPU.",
    "compile": "off",  # takes as long as it saves in jobs of a minute
    "ddpm": {
        "optimizer": {"learning_rate": 3.0e-4},
        "ema_decay": 0.999,
        "checkpoint_minutes": 0.5,
        "sample_every": 0,
    },
    "classifiers": {
        role: {"epochs": epochs, "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 100}, "checkpoint_minutes": 0.5}
        for role, epochs in (("non_robust", 1), ("robust", 2), ("judge", 1))
    },
    "forward": {"num_images": 256},
    "sampling": {"start": "data_mean", "num_samples": 256, "shard_size": 256},
    "evaluation": {"features": "judge"},
    "sweep": {
        "unconditional": [0],
        "non_robust_x0_ema99": [15, 5, 25],
        "robust": [15, 5, 50],
        "non_robust": [15, 1],
        "non_robust_x0": [15, 5],
        "non_robust_x0_ema90": [15, 5],
        "non_robust_x0_adam": [0.1, 0.05],
        "robust_x0": [15, 5],
    },
}
"""What differs from config.yaml's `sportballs`. The scales stand in the order in which they are tried."""
TOY: dict = {
    "description": "Toy size, to try the script: not a result.",
    "precision": "float32",
    "dataset": {"name": "toyballs", "image_size": 16, "num_train": 256, "num_val": 64, "diameter": [0.5, 0.9]},
    "ddpm": {
        "schedule": {"num_train_timesteps": 8, "beta_start": 0.01, "beta_end": 0.8},
        "unet": {
            "block_out_channels": [8, 16],
            "attention": [False, True],
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        "batch_size": 32,
        "num_val_images": 16,
        "checkpoint_minutes": 0.02,
    },
    "classifiers": {
        role: {"architecture": "small_cnn", "epochs": 1, "batch_size": 32, "checkpoint_minutes": 0.02} for role in ROLES
    },
    "forward": {"num_images": 8, "batch_size": 8},
    "sampling": {"num_samples": 8, "shard_size": 8, "batch_size": 8},
    "evaluation": {"num_reference": 64},
    "sweep": {name: scales[: 1 + (name == COMPARED[-1])] for name, scales in SETTINGS["sweep"].items()},
}
"""Laid over SETTINGS by --toy."""


def plan_training(images_per_second: float, seconds: float, num_train: int, batch_size: int) -> tuple[int, int]:
    """Epochs, and the training images of each, that some seconds hold: passes over the first images of the data set,
    so that the learning rate's schedule ends when the time does; at least one batch."""
    images = max(MARGIN * images_per_second * (seconds - START_SECONDS), batch_size)
    epochs = math.ceil(images / num_train)
    return epochs, min(num_train, max(round(images / epochs / batch_size), 1) * batch_size)


def in_turn(sweep: dict[str, list[float]]) -> list[tuple[str, float]]:
    """Methods and scales: the first scale of every method, then the second of those that have one, and so on."""
    rounds = range(max(map(len, sweep.values())))
    return [(method, scales[turn]) for turn in rounds for method, scales in sweep.items() if turn < len(scales)]


class OutOfTime(Exception):
    """The call's minutes, or a training's, are up."""


@dataclass(frozen=True)
class Job:
    """A piece of a stage's work.

    Attributes:
        makes: A file that is there when, and only when, the job is done.
        work: Makes it.
        kind, amount: Jobs of a kind take time by their amount.
        needs: A file without which it has to wait.
    """

    makes: Path
    work: Callable[[], object]
    kind: str
    amount: float = 1.0
    needs: Path | None = None


class Run:
    """The folders of a run, its settings, its clock, and what is remembered from call to call."""

    def __init__(self, arguments: argparse.Namespace, end: float) -> None:
        self.arguments, self.end, self.toy = arguments, end, arguments.toy
        self.out = arguments.out.resolve()
        self.work, self.tables, self.ddpm = self.out / "work", self.out / "tables", self.out / "ddpm"
        self.work.mkdir(parents=True, exist_ok=True)
        self.path = self.work / "state.json"
        self.state: dict = json.loads(self.path.read_text()) if self.path.exists() else {}
        asked = {name: self._given(getattr(arguments, name)) for name in ("init", "pretrained")} | {"toy": self.toy}
        if self.state.setdefault("asked", asked) != asked:
            raise SystemExit(f"{self.path}: begun with {self.state['asked']}; give another --out")
        for name in ("spent", "pace", "failures"):
            self.state.setdefault(name, {})
        self.budgets = {name: 60 * minutes for name, minutes in (BUDGETS | dict(arguments.budget)).items()}
        self._loaded: dict[str, Any] = {}
        self.beside = arguments.beside or self.device().type != "cpu"
        self.children: dict[str, tuple[subprocess.Popen, Path]] = {}
        self.left_overs = False  # whether the stages have had their minutes

    def _given(self, folder: Path | None) -> str | None:
        """A model's folder as seen from the work folder, where the steps run: by a link of the name that was given, so
        that what is recorded names no machine's paths."""
        if folder is None:
            return None
        name = Path(folder.name) if folder.is_absolute() or ".." in folder.parts else folder
        link = self.work / "given" / name
        if not link.exists():
            link.unlink(missing_ok=True)  # it may have come from another machine
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder.resolve(strict=True))
        return f"given/{name}"

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1) + "\n")
        temporary.replace(self.path)

    def left(self, stage: str) -> float:
        """Seconds that a stage may still take."""
        call = self.end - time.monotonic()
        return call if self.left_overs else min(call, self.budgets[stage] - self.state["spent"].get(stage, 0.0))

    def account(self, stage: str, seconds: float) -> None:
        self.state["spent"][stage] = self.state["spent"].get(stage, 0.0) + seconds
        self.save()

    def block(self, kind: str = "main") -> dict:
        """The experiment's settings: `main`, `train` (the U-Net's images) or `sweep`."""
        from nrcg.config import merge, read_yaml

        block = merge(read_yaml(ROOT / "config.yaml")["experiments"][EXPERIMENT], SETTINGS)
        block = merge(block, TOY if self.toy else {})
        block["compile"] = self.arguments.compile
        block["unet_weights"] = "float16" if self.device().type == "cuda" else None
        if kind == "train":
            epochs, images = self.state["plan"]
            name, most = block["dataset"]["name"], block["ddpm"].get("num_val_images", 2048)
            block["dataset"] |= {"name": f"{name}_first{images}", "num_train": images, "num_val": most}
            block["ddpm"] |= {"epochs": epochs, "init": self.state["asked"]["init"]}
        if self.arguments.pretrained:
            block["ddpm"]["pretrained"] = self.state["asked"]["pretrained"]
        return block

    def config(self, kind: str = "main") -> Path:
        """A config file with this experiment alone. In a sweep each method takes half of the steps, and those whose
        gradient passes the U-Net skip it where the class is certain."""
        from nrcg.config import read_yaml

        raw = read_yaml(ROOT / "config.yaml")
        raw["experiments"] = {EXPERIMENT: self.block(kind)}
        raw["methods"] = {name: raw["methods"][name] for name in SETTINGS["sweep"]}
        if kind == "sweep":
            for method in raw["methods"].values():
                through_unet = method.get("classifier") and method["input"] == "pred_x0"
                method |= {"preset": "fast"} if through_unet else {"sampler": {"name": "ddpm", "steps": 0.5}}
        path, text = self.work / f"{kind}.json", json.dumps(raw, indent=1) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def settings(self, step: str, part: str | None = None, kind: str = "main") -> Any:
        """Of a step of the package, for a role or a method."""
        from nrcg.config import load, step_settings

        if kind not in self._loaded:
            self._loaded[kind] = load(self.config(kind))
        return step_settings(self._loaded[kind], EXPERIMENT, step, part)

    @cached_property
    def data(self) -> Path:
        return self.work / "data" / self.block()["dataset"]["name"]

    @property
    def classifiers(self) -> Path:
        return self.work / "classifiers"

    def device(self) -> Any:
        from nrcg.devices import resolve_device

        return resolve_device("auto")

    def computing(self) -> dict[str, Any]:
        """Device and precision, for the steps."""
        from nrcg.devices import resolve_precision

        device, settings = self.device(), self.settings("forward")
        precision = resolve_precision(settings.precision, device, unet_weights=settings.unet_weights)
        return {"device": device, "precision": precision}

    # Verbs: on a GPU processes of their own, which run side by side; on a CPU one after the other, here.

    def start(self, name: str, words: Sequence[object]) -> None:
        """Begin an `nrcg` verb. Raises SystemExit where it fails at once."""
        argv = list(map(str, words))
        if not self.beside:
            from nrcg.cli import main as nrcg

            if nrcg(argv):
                raise SystemExit(f"failed: nrcg {' '.join(argv)}")
            return
        log = self.work / f"{name}.log"
        with open(log, "a") as file:
            command = [sys.executable, "-m", "nrcg.cli", *argv]
            self.children[name] = (subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT), log)

    def wait(self, name: str, seconds: float) -> None:
        """Wait for a verb. Raises OutOfTime after some seconds, SystemExit where it fails; then all verbs are ended."""
        if name not in self.children:
            return
        child, log = self.children.pop(name)
        try:
            if child.wait(max(seconds, 0.0)):
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{name}: exit code {child.returncode}; {log}:\n{tail}")
        except (subprocess.TimeoutExpired, SystemExit) as error:
            for one, _ in [(child, log), *self.children.values()]:
                one.kill()
                one.wait()
            self.children.clear()
            raise (OutOfTime(name) if isinstance(error, subprocess.TimeoutExpired) else error) from None

    def do(self, stage: str, jobs: Iterable[Job], keep: float = 0.0) -> bool:
        """Do jobs in turn, none that would outlast the stage's time less `keep` seconds; one that fails is noted, and
        done again by the next call alone. True where all are done."""
        whole = True
        for job in jobs:
            if job.makes.exists():
                continue
            name = str(job.makes.relative_to(self.out))
            expected = self.state["pace"].get(job.kind, 0.0) * job.amount
            waits = job.needs is not None and not job.needs.exists()
            late = expected > self.left(stage) - keep or self.left(stage) <= 0
            if waits or late or name in self.state["failures"]:
                whole = False
                continue
            began = time.monotonic()
            try:
                job.work()
            except Exception as error:  # of one setting: the others are wanted all the same
                traceback.print_exc()
                self.state["failures"][name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                whole = False
            seconds = time.monotonic() - began
            if name not in self.state["failures"]:
                self.state["pace"][job.kind] = seconds / job.amount
            self.account(stage, seconds)
            print(f"{stage}: {seconds:.1f} s  {name}", flush=True)
        return whole
