"""The published comparison on SportBalls, 64 x 64, on one GPU that is lent for minutes at a time.

Made for a machine that gets a copy of the checkout and nothing else, has no network, ends each call after ten minutes
and may be bare at the next. A call does what is still missing, in this order, until its minutes are up; what is whole
is never done again. The stages run `nrcg` verbs, and need neither Snakemake nor MLflow nor DVC.

    stage        what                                                              minutes on a large GPU, estimated
    dataset      100,000 images; drawn anew on a bare machine                      0.3
    plan         speed of training, from it the epochs that --train-minutes hold   0.7
    ddpm         the paper's U-Net; a checkpoint each half minute, bf16 weights    7      these three: call 1
    classifiers  two guides and the judge, side by side                            1.5
    forward      figs. 1 to 4 on 512 images                                        1.5
    speed        training_speed.py and guidance_speed.py on this device            4      with dataset: call 2
    sweep        all methods over their scales (fig. 8), the middle scales first   8      call 3
    best         unconditional, robust, EMA 0.99 at their best, 5,120 samples      14     calls 4 and 5
    pareto       guidance_quality.py: what each saving costs                       8      call 6
    report       metrics.csv, best.csv, figures, speeds.json, report.html          0.3    at the end of each call

    python benchmarks/gpu_reproduction.py --minutes 9 --out OUT                  # first call
    python benchmarks/gpu_reproduction.py --minutes 9 --state STATE --out OUT    # STATE holds the files of the last OUT

OUT gets at most eight zip files of less than 16 MiB: models, tables, figures, and the shards of unfinished samples.
Training cannot cross to another machine, its checkpoint being too large to carry: where the minutes end first, the
weights' average so far is kept and becomes the model. On a machine that kept --work, training goes on. `--unpack` puts
the files of STATE into WORK and ends: results are in WORK/results then, the models in WORK/models/sportballs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPERIMENT, BEST = "sportballs", "sportballs_best"
STAGES = ("dataset", "plan", "ddpm", "classifiers", "forward", "speed", "sweep", "best", "pareto", "report")
ROLES = ("non_robust", "robust", "judge")
COMPARED = ("unconditional", "robust", "non_robust_x0_ema99")
"""Methods of the stage `best`."""

VOLUME_BYTES = 15 * 2**20
MAX_VOLUMES = 8
CARRIED_BYTES = 50 * 2**20
"""Of all together: on the way in, the checkout and the wheels share 64 MiB with them."""
KEPT_SAMPLES = {EXPERIMENT: 32, BEST: 128}
"""Samples of each method and scale that come back, for the figures."""
RESERVE_SECONDS = 25.0
"""Before the end of a call, for the tables, the figures and the files that come back."""
SALVAGE_SECONDS = 30.0
START_UP_SECONDS = 45.0
"""Of a training that are no training: imports, the first step, the grid of samples."""

# What differs from config.yaml's `sportballs`: a training of minutes, not days, and samples by the hundred.
SETTINGS: dict = {
    "description": "SportBalls at 64 x 64 pixels, the paper's U-Net trained for minutes on one GPU.",
    "ddpm": {
        "optimizer": {"learning_rate": 3.0e-4},
        "ema_decay": 0.999,
        "checkpoint_minutes": 0.5,
        "sample_every": 0,
    },
    "classifiers": {
        "non_robust": {"epochs": 3, "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 100}},
        "robust": {"epochs": 6, "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 100}},
        # Small enough to be carried: neither the guides' architecture nor their seed.
        "judge": {
            "architecture": "shufflenet_v2_x0_5",
            "epochs": 4,
            "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 100},
        },
    },
    "forward": {"num_images": 512},
    "sampling": {"start": "data_mean"},
    "evaluation": {"features": "judge", "num_reference": 15000},
    "sweep": {
        "unconditional": [0],
        "robust": [5, 15, 50],
        "robust_x0": [1, 5, 15],
        "non_robust": [1, 15],
        "non_robust_x0": [1, 5, 15],
        "non_robust_x0_ema90": [1, 5, 15],
        "non_robust_x0_ema99": [1, 5, 10, 15, 25],
        "non_robust_x0_adam": [0.01, 0.05, 0.1],
    },
}
# The same lines of code at a size that a CPU does in a minute or two. No result.
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
            "norm_num_groups": 4,
        },
        "batch_size": 32,
        "num_val_images": 16,
        "checkpoint_minutes": 0.005,
    },
    "classifiers": {role: {"architecture": "small_cnn", "epochs": 1, "batch_size": 32} for role in ROLES},
    "forward": {"num_images": 8, "batch_size": 8},
    "sampling": {"batch_size": 16},
    "evaluation": {"num_reference": 64},
    "sweep": {"non_robust_x0_ema99": [1, 5]} | {name: [1] for name in ("robust", "robust_x0", "non_robust")},
}


# --- Plans: functions of numbers alone ---------------------------------------------------------------------------


def plan_epochs(images_per_second: float, num_train: int, seconds: float) -> int:
    """Passes over the training images that fit into some seconds of training, with a twentieth to spare; at least 1."""
    return max(1, int(0.95 * images_per_second * max(seconds - START_UP_SECONDS, 0.0) / num_train))


def plan_sweep_samples(sweep: Mapping[str, Sequence[float]], images_per_second: float | None, seconds: float) -> int:
    """Samples of each method and scale, 128 to 1024 in steps of 64, that a sweep of some seconds can draw.

    Args:
        images_per_second: with the full gradient; the other methods take about a third of its time. None: unknown.
    """
    if images_per_second is None:
        return 256
    full = sum(len(scales) for method, scales in sweep.items() if "x0" in method)
    light = sum(map(len, sweep.values())) - full
    start_up = 3.0 * (full + light)  # opening the models, finding the batch size
    number = images_per_second * max(seconds - start_up, 0.0) / (full + light / 3)
    return min(1024, max(128, int(number) // 64 * 64))


def sweep_order(sweep: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    """Methods and scales, each method's middle scale first, then its neighbours: wherever the time ends, every method
    has been tried near the place where its best scale is expected."""
    ranked = []
    for position, (method, scales) in enumerate(sweep.items()):
        ordered = sorted(scales)
        middle = (len(ordered) - 1) / 2
        outwards = sorted(ordered, key=lambda scale: (abs(ordered.index(scale) - middle), -scale))
        ranked += [(turn, position, method, scale) for turn, scale in enumerate(outwards)]
    return [(method, scale) for _, _, method, scale in sorted(ranked)]


def pack_bins(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in as few bins as first-fit decreasing finds, each of at most `limit` together.

    Raises:
        ValueError: one alone is larger.
    """
    bins: list[tuple[int, list[str]]] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size > limit:
            raise ValueError(f"{name}: {size:,} bytes; a file that comes back has at most {limit:,}")
        for index, (used, names) in enumerate(bins):
            if used + size <= limit:
                bins[index] = (used + size, [*names, name])
                break
        else:
            bins.append((size, [name]))
    return [names for _, names in bins]


# --- What travels ------------------------------------------------------------------------------------------------


def carried_files(work: Path) -> tuple[list[Path], list[Path]]:
    """Files to bring back, relative to the work folder: those that must, and the shards of unfinished settings, each
    followed by its record."""
    must = [work / "state.json", *(work / "logs").glob("*.log"), *(work / "models" / EXPERIMENT).rglob("*")]
    must += [path for path in (work / "results").rglob("*") if "samples" not in path.relative_to(work).parts[:3]]
    shards = []
    for experiment in (EXPERIMENT, BEST):
        results = work / "results" / experiment
        for path in sorted((results / "samples").glob("*/*/shard*.npy")):
            record = path.with_suffix(".json")
            if not metrics_path(work, experiment, path.parts[-3], path.parts[-2][len("scale") :]).exists():
                shards += [path, record] if record.exists() else []
    hidden = [path for path in must if not path.is_file() or path.name.startswith(".")]
    return [path.relative_to(work) for path in must if path not in hidden], [path.relative_to(work) for path in shards]


def pack(work: Path, out: Path) -> list[Path]:
    """Write what is to be carried as state-1.zip, state-2.zip, ... into `out`; shards as far as they fit.

    Raises:
        ValueError: more than eight files.
    """
    must, shards = carried_files(work)
    overhead = 400  # of an entry of a zip file
    sizes = {str(path): len(zlib.compress((work / path).read_bytes(), 6)) + overhead for path in must}
    bins = pack_bins(sizes, VOLUME_BYTES)
    for path, record in zip(shards[::2], shards[1::2], strict=True):
        more = {str(name): len(zlib.compress((work / name).read_bytes(), 6)) + overhead for name in (path, record)}
        if sum(sizes.values()) + sum(more.values()) > CARRIED_BYTES:
            break
        tried = pack_bins(sizes | more, VOLUME_BYTES)
        if len(tried) > MAX_VOLUMES:
            break
        sizes, bins = sizes | more, tried
    if len(bins) > MAX_VOLUMES or sum(sizes.values()) > 64 * 2**20:
        raise ValueError(f"{len(bins)} files of {sum(sizes.values()):,} bytes together are too many to be carried")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, names in enumerate(bins, 1):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name in sorted(names):
                archive.write(work / name, name)
        path = out / f"state-{number}.zip"
        temporary = out / f"{path.name}.tmp"
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
        written.append(path)
    for path in set(out.glob("state-*.zip")) - set(written):
        path.unlink()
    return written


def unpack(state: Path, work: Path) -> int:
    """Put the files of the last call into the work folder; one that is there already stays. Returns how many came."""
    count = 0
    for archive_path in sorted(state.glob("state-*.zip")):
        with zipfile.ZipFile(archive_path) as archive:
            for name in archive.namelist():
                target = (work / name).resolve()
                if not target.is_relative_to(work.resolve()):
                    raise SystemExit(f"{archive_path}: {name} would lie outside of {work}")
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
                    count += 1
    return count


def metrics_path(work: Path, experiment: str, method: str, scale: str) -> Path:
    return work / "results" / experiment / "metrics" / f"{method}@{scale}.csv"


# --- Jobs: nrcg verbs in one process of their own ----------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One `nrcg` verb.

    Attributes:
        argv: of nrcg.
        makes: a file that is there when, and only when, the job is done.
        kind, images: jobs of a kind take time by their images; one that would not end in time is not begun.
        beside: may run beside the following jobs, on other cores.
        keep: after it, this many samples of `folder` are copied to `kept`.
    """

    argv: list[str]
    makes: str
    kind: str = ""
    images: int = 0
    beside: bool = False
    keep: int = 0
    folder: str = ""
    kept: str = ""


def run_jobs(jobs: Iterable[Job], seconds: float) -> int:
    """Do jobs in turn until the time is up; returns how many are left. The importing is done once for all."""
    from nrcg.cli import main as nrcg

    deadline, pace, beside, left = time.monotonic() + seconds, {}, [], 0
    spare_cores = (os.cpu_count() or 1) >= 8
    for job in jobs:
        if Path(job.makes).exists():
            continue
        expected = pace.get(job.kind, 0.0) * job.images
        if left or time.monotonic() + expected > deadline:
            left += 1
            continue
        began = time.monotonic()
        for entry in [entry for entry in beside if entry[1].poll() is not None]:
            _finish(*entry)
            beside.remove(entry)
        if job.beside and spare_cores:
            while len(beside) >= 4:
                _finish(*beside.pop(0))
            beside.append((job, subprocess.Popen([sys.executable, "-m", "nrcg.cli", *job.argv])))
            continue
        if nrcg(job.argv):
            raise SystemExit(f"failed: nrcg {' '.join(job.argv)}")
        _keep(job)
        taken = time.monotonic() - began
        if job.images:
            pace[job.kind] = taken / job.images
        print(f"{taken:7.1f} s  {job.argv[0]} -> {job.makes}", flush=True)
    for entry in beside:
        _finish(*entry)
    return left


def _finish(job: Job, process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"failed: nrcg {' '.join(job.argv)}")
    _keep(job)


def _keep(job: Job) -> None:
    """Copy the first samples of a setting to where the figures look for them."""
    if not job.keep:
        return
    import numpy as np

    from nrcg.files import atomic_save_array

    first = np.concatenate([np.load(path, mmap_mode="r") for path in sorted(Path(job.folder).glob("shard*.npy"))])
    atomic_save_array(Path(job.kept) / "shard0.npy", first[: job.keep])


class OutOfTime(Exception):
    """The call's minutes are up."""


class Call:
    """One call: its folders, its settings, its end."""

    def __init__(self, work: Path, out: Path, minutes: float, toy: bool):
        self.work, self.out, self.toy = work, out, toy
        self.deadline = time.monotonic() + 60 * minutes
        work.mkdir(parents=True, exist_ok=True)
        self.state_path = work / "state.json"
        self.state: dict = json.loads(self.state_path.read_text()) if self.state_path.exists() else {}
        if self.state.setdefault("toy", toy) != toy:
            raise SystemExit(f"{self.state_path}: --toy or not, as in the first call")
        self._config: tuple[str, Path] | None = None
        self.data = work / "data" / self.settings()["dataset"]["name"]
        self.models = work / "models" / EXPERIMENT

    def left(self) -> float:
        """Seconds of work before the reserve."""
        return self.deadline - time.monotonic() - RESERVE_SECONDS * (0.2 if self.toy else 1.0)

    def save(self) -> None:
        temporary = self.state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2) + "\n")
        temporary.replace(self.state_path)

    def settings(self, best: bool = False) -> dict:
        """The experiment's block, merged from config.yaml's, ours and what was planned."""
        from nrcg.config import merge, read_yaml

        block = merge(read_yaml(ROOT / "config.yaml")["experiments"]["sportballs"], SETTINGS)
        if self.toy:
            block = merge(block, TOY)
            block["sweep"] = {name: scales[:2] for name, scales in block["sweep"].items()}
        samples = self.state.get("sweep_samples", 256)
        planned: dict = {"sampling": {"num_samples": samples, "shard_size": samples}}
        if "epochs" in self.state:
            planned["ddpm"] = {"epochs": self.state["epochs"]}
        if best:
            number, shard = (20, 8) if self.toy else (5120, 512)
            planned["sampling"] = {"num_samples": number, "shard_size": shard}
            planned["evaluation"] = {"num_reference": None}
        return merge(block, planned)

    def config(self) -> Path:
        """config.yaml with our experiments in place of its own, written anew where a plan has changed."""
        from nrcg.config import read_yaml

        planned = json.dumps([self.state.get("epochs"), self.state.get("sweep_samples")])
        if self._config is None or self._config[0] != planned:
            raw = read_yaml(ROOT / "config.yaml")
            raw["experiments"] = {EXPERIMENT: self.settings(), BEST: self.settings(best=True)}
            path = self.work / "config.json"
            path.write_text(json.dumps(raw, indent=1) + "\n")
            self._config = planned, path
        return self._config[1]

    def run(self, command: Sequence[str], log: str, reserve: float = 0.0) -> bool:
        """Run a command until it ends or the time is up; False for the latter.

        Raises:
            SystemExit: it failed.
        """
        (self.work / "logs").mkdir(exist_ok=True)
        path = self.work / "logs" / f"{log}.log"
        environment = os.environ | {"NRCG_TRACKING": "off", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if self.toy:
            environment["OMP_NUM_THREADS"] = "1"
        with open(path, "a") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(self.left() - reserve, 0.01))
            except subprocess.TimeoutExpired:
                return False
            finally:
                # Whatever is still running goes with it, also after Ctrl-C.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{log}: exit code {code}; {path}:\n{tail}")
        return True

    def verbs(self, jobs: Sequence[Job], log: str) -> None:
        """Do jobs in a process of their own. Raises OutOfTime where some are left."""
        if not all(Path(job.makes).exists() for job in jobs):
            path = self.work / f"{log}.jobs.json"
            path.write_text(json.dumps([asdict(job) for job in jobs]))
            self.run([sys.executable, __file__, "--jobs", str(path), "--seconds", f"{self.left():.1f}"], log)
        if not all(Path(job.makes).exists() for job in jobs):
            raise OutOfTime


# --- The stages --------------------------------------------------------------------------------------------------


def verb(call: Call, name: str, *, experiment: str | None = EXPERIMENT, **flags: object) -> list[str]:
    """The words of an `nrcg` verb."""
    argv = [name]
    if experiment:
        argv += ["--config", str(call.config()), "--experiment", experiment]
    for flag, value in flags.items():
        argv += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def dataset(call: Call) -> None:
    threads = 1 if call.toy else os.cpu_count() or 1
    made = call.data / "dataset.json"
    call.verbs([Job(verb(call, "dataset", out=call.data, threads=threads), str(made))], "dataset")


def plan(call: Call, train_minutes: float | None) -> None:
    """Epochs, from the speed of training on this device."""
    if "epochs" in call.state or (call.models / "ddpm" / "model_index.json").exists():
        return
    found = call.work / "training_plan.json"
    toy = ["--toy", "--size", "16", "--batch-size", "32", "--seconds", "1"] if call.toy else ["--seconds", "15"]
    command = [sys.executable, str(ROOT / "benchmarks" / "training_speed.py"), "--variants", "ours", "--repeats", "1"]
    if not call.run([*command, "--json", str(found), *toy], "plan"):
        raise OutOfTime
    speed = json.loads(found.read_text())["summary"]["ours"]["images_per_second"]
    seconds = call.left() - SALVAGE_SECONDS if train_minutes is None else 60 * train_minutes
    epochs = plan_epochs(speed, call.settings()["dataset"]["num_train"], seconds)
    call.state |= {"training_images_per_second": speed, "epochs": min(epochs, 6) if call.toy else epochs}
    call.save()
    print(f"plan: {speed:.0f} images/s, {call.state['epochs']} epochs", flush=True)


def ddpm(call: Call) -> None:
    """Train, export; where the time ends first, export the average of the weights so far."""
    made, trained = call.models / "ddpm" / "training.json", call.work / "trained" / "ddpm"
    checkpoint = trained.with_name("ddpm.checkpoint.pt")
    if made.exists() and not checkpoint.exists():
        return
    train = verb(call, "train-ddpm", data=call.data, out=trained)
    whole = (trained / "training.json").exists() or call.run(
        [sys.executable, "-m", "nrcg.cli", *train], "ddpm", reserve=1.0 if call.toy else SALVAGE_SECONDS
    )
    if not whole:
        if not checkpoint.exists():
            raise OutOfTime
        salvage(call, checkpoint)
        raise OutOfTime
    made.unlink(missing_ok=True)  # an unfinished training's
    export = verb(call, "export-ddpm", experiment=None, ddpm=trained, out=call.models / "ddpm")
    call.verbs([Job([*export, "--name", "SportBalls 64 x 64"], str(made))], "export")
    checkpoint.unlink(missing_ok=True)


def salvage(call: Call, checkpoint: Path) -> None:
    """Export the weights' average of a training that was cut off, with its rows so far."""
    import torch
    from diffusers import DDPMPipeline

    from nrcg import config
    from nrcg.csv_files import write_csv
    from nrcg.data.arrays import load_manifest, mean_image
    from nrcg.diffusion.storage import DATA_MEAN_FILE
    from nrcg.diffusion.unet import build_scheduler, build_unet
    from nrcg.files import atomic_save_array
    from nrcg.training.export import export_ddpm

    settings = config.step_settings(config.load(call.config()), EXPERIMENT, "train_ddpm")
    manifest = load_manifest(call.data)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    unet = build_unet(settings.ddpm.unet, manifest["image_size"], manifest["channels"])
    for parameter, average in zip(unet.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    per_epoch = manifest["splits"]["train"]["num_images"] // settings.ddpm.batch_size
    done = f"{state['trainer']['step'] / per_epoch:.2f} of {settings.ddpm.epochs}"
    record = {"settings": settings.model_dump(mode="json"), "dataset": {"dataset": manifest["name"]}}
    partial = call.work / "partial_ddpm"
    DDPMPipeline(unet, build_scheduler(settings.ddpm.schedule)).save_pretrained(partial)
    atomic_save_array(partial / DATA_MEAN_FILE, mean_image(call.data))
    (partial / "training.json").write_text(json.dumps(record | {"epochs_done": done}))
    if rows := state["trainer"]["log"]:
        write_csv(partial / "training.csv", rows, list(rows[0]))
    export_ddpm(partial, call.models / "ddpm", name="SportBalls 64 x 64 (training cut off)")
    shutil.rmtree(partial)
    call.state["training_cut_off_at"] = done
    call.save()
    print(f"ddpm: cut off at epoch {done}; the weights' average so far is kept", flush=True)


def classifiers(call: Call) -> None:
    """Train the guides and the judge: side by side on a GPU, whose kernels they are too small to fill."""
    jobs, exports = [], []
    for role in ROLES:
        trained = call.work / "trained" / "classifiers" / role
        out = call.models / "classifiers" / role
        train = verb(call, "train-classifier", role=role, data=call.data, out=trained)
        export = verb(call, "export-classifier", experiment=None, classifier=trained, out=out)
        if not (out / "model.safetensors").exists():
            jobs.append(Job(train, str(trained / "model.safetensors"), beside=True))
            exports.append(Job(export, str(out / "model.safetensors")))
    call.verbs(jobs, "classifiers")
    call.verbs(exports, "export")


def forward(call: Call) -> None:
    out = call.work / "results" / EXPERIMENT / "forward.csv"
    models = {"ddpm": call.models / "ddpm", "classifiers": call.models / "classifiers"}
    call.verbs([Job(verb(call, "forward", data=call.data, **models, out=out), str(out))], "forward")


def speed(call: Call) -> None:
    """The two benchmarks of speed on this device."""
    folder = call.work / "results" / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    train = ["--toy", "--size", "16", "--batch-size", "32", "--seconds", "0.2", "--repeats", "1"]
    guide = ["--size", "16", "--batch-size", "2", "--steps", "4", "--repeats", "1", "--variants", "plain", "full"]
    if not call.toy:
        train = ["--seconds", "8", "--repeats", "2"]
        guide = ["--batch-size", "64", "--steps", "8", "--repeats", "2"]
    for name, flags in (("training_speed", train), ("guidance_speed", guide)):
        found = folder / f"{name}.json"
        if not found.exists():
            script = str(ROOT / "benchmarks" / f"{name}.py")
            if not call.run([sys.executable, script, "--json", str(found), *flags], name):
                raise OutOfTime


def sampling_jobs(call: Call, experiment: str, settings: Sequence[tuple[str, float]]) -> list[Job]:
    """The reference, then shards of each method and scale, each followed by its evaluation."""
    from nrcg.config import load
    from nrcg.layout import format_scale

    config = load(call.config())
    sampling, results = config.experiments[experiment].sampling, call.work / "results" / experiment
    shards = range(-(-sampling.num_samples // sampling.shard_size))
    reference = results / "reference.json"
    paths = {"data": call.data, "classifiers": call.models / "classifiers"}
    jobs = [Job(verb(call, "reference", experiment=experiment, **paths, out=reference), str(reference))]
    for method, scale in settings:
        text, guide = format_scale(scale), config.methods[method].classifier
        folder, made = results / "samples" / method / f"scale{text}", metrics_path(call.work, experiment, method, text)
        if made.exists():
            continue
        models = {"ddpm": call.models / "ddpm"} | ({"classifier": call.models / "classifiers" / guide} if guide else {})
        flags = {"method": method, "scale": text} | models
        for shard in shards:
            path = folder / f"shard{shard}.npy"
            argv = verb(call, "sample", experiment=experiment, shard=shard, out=path, **flags)
            kind = f"{config.methods[method].input if guide else 'none'}"
            jobs.append(Job(argv, str(path.with_suffix(".json")), kind, sampling.shard_size))
        compared = paths | {"samples": results / "samples", "reference": reference}
        argv = verb(call, "evaluate", experiment=experiment, method=method, scales=[text], **compared, out=made)
        keep = {"keep": KEPT_SAMPLES[experiment], "folder": str(folder)}
        kept = str(results / "kept" / method / f"scale{text}")
        jobs.append(Job([*argv, "--threads", "2"], str(made), beside=True, kept=kept, **keep))
    return jobs


def sweep(call: Call, minutes: float) -> None:
    """All methods over their scales, with as many samples as the minutes allow."""
    if "sweep_samples" not in call.state:
        found = call.work / "results" / "speed" / "guidance_speed.json"
        full = None
        if found.exists():
            full = json.loads(found.read_text())["summary"]["full"]["images_per_second"]
        number = plan_sweep_samples(call.settings()["sweep"], full, 60 * minutes)
        call.state["sweep_samples"] = 8 if call.toy else number
        call.save()
    call.verbs(sampling_jobs(call, EXPERIMENT, sweep_order(call.settings()["sweep"])), "sweep")


def best_scales(call: Call) -> dict[str, float]:
    """Each method's scale of lowest class-conditional distance in the sweep."""
    from nrcg.report.best import best_per_method
    from nrcg.report.columns import read_metrics

    rows = [
        row for path in (call.work / "results" / EXPERIMENT / "metrics").glob("*.csv") for row in read_metrics(path)
    ]
    return {method: float(row["scale"]) for method, row in best_per_method(rows).items()}


def best(call: Call) -> None:
    """The methods that the claims compare, at their best scale, with many samples."""
    scales = best_scales(call)
    call.verbs(sampling_jobs(call, BEST, [(method, scales[method]) for method in COMPARED]), "best")


def pareto(call: Call) -> None:
    """What each saving costs, around EMA 0.99's best scale."""
    folder = call.work / "results" / "quality"
    if (folder / "quality.png").exists():
        return
    number = ["--num-samples", "8", "--num-reference", "64", "--batch-size", "8"] if call.toy else []
    number = number or ["--num-samples", "256", "--num-reference", "15000", "--batch-size", "256"]
    command = [sys.executable, str(ROOT / "benchmarks" / "guidance_quality.py"), "--models", str(call.models), *number]
    command += ["--data", str(call.data), "--out", str(folder), "--resume", "--num-scales", "1"]
    if not call.run([*command, "--times", str(best_scales(call)["non_robust_x0_ema99"] / 2)], "pareto"):
        raise OutOfTime


def report(call: Call) -> None:
    """Tables, figures and the report of what there is so far."""
    results = call.work / "results"
    jobs, stamp = [], time.time_ns()
    for experiment, name in ((EXPERIMENT, "metrics"), (BEST, "best")):
        tables = sorted((results / experiment / "metrics").glob("*.csv"))
        if tables:
            out = results / experiment / f"{name}.csv"
            argv = verb(call, "collect", experiment=None, metrics=tables, out=out)
            jobs.append(Job([*argv, "--summary", str(results / experiment / "summary.json")], f"{out}.{stamp}"))
    paths = {"forward": results / EXPERIMENT / "forward.csv", "metrics": results / EXPERIMENT / "metrics.csv"}
    if paths["forward"].exists() and jobs:
        drawn = {"samples": results / EXPERIMENT / "kept", "out": results / EXPERIMENT / "figures"}
        jobs.append(Job(verb(call, "figures", **paths, **drawn), f"figures.{stamp}"))
        drawn |= {"figures": drawn["out"], "models": call.models, "out": results / EXPERIMENT / "report.html"}
        jobs.append(Job(verb(call, "report", **paths, **drawn), f"report.{stamp}"))
    speeds = {path.stem: json.loads(path.read_text())["summary"] for path in sorted((results / "speed").glob("*.json"))}
    if speeds:
        speeds["calls"] = call.state.get("calls", [])
        (results / "speeds.json").write_text(json.dumps(speeds, indent=2) + "\n")
    if jobs:
        path = call.work / "report.jobs.json"
        path.write_text(json.dumps([asdict(job) for job in jobs]))
        call.deadline += RESERVE_SECONDS  # this is what the reserve is for
        call.run([sys.executable, __file__, "--jobs", str(path), "--seconds", "1000"], "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".nrcg" / "gpu", help="everything; large; kept where possible"
    )
    parser.add_argument("--out", type=Path, help="folder for the files that come back")
    parser.add_argument("--state", type=Path, help="folder with the files of the last call")
    parser.add_argument("--unpack", action="store_true", help="only put the files of --state into --work")
    parser.add_argument("--minutes", type=float, default=9.0, help="the call ends before")
    parser.add_argument(
        "--train-minutes", type=float, help="of the diffusion model; default: the rest of the first call"
    )
    parser.add_argument("--sweep-minutes", type=float, default=8.0, help="decides how many samples a setting has")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="only these")
    parser.add_argument("--toy", action="store_true", help="toy size, on any machine")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        run_jobs([Job(**entry) for entry in json.loads(arguments.jobs.read_text())], arguments.seconds)
        return
    work = arguments.work.resolve()
    if arguments.state:
        print(f"{unpack(arguments.state, work)} files came with the last call", flush=True)
    if arguments.unpack:
        return
    if arguments.out is None:
        parser.error("--out: missing")
    sys.exit(one_call(Call(work, arguments.out.resolve(), arguments.minutes, arguments.toy), arguments))


def one_call(call: Call, arguments: argparse.Namespace) -> int:
    """Do the stages that are missing; returns 0 where all are done, 3 where another call is needed."""
    more = {"plan": {"train_minutes": arguments.train_minutes}, "sweep": {"minutes": arguments.sweep_minutes}}
    log: dict = {"stages": {}}
    call.state.setdefault("calls", []).append(log)
    began, waiting = time.monotonic(), list(arguments.stages)
    try:
        while waiting and waiting[0] != "report":
            stage, start = waiting[0], time.monotonic()
            if call.left() <= 0:
                break
            try:
                globals()[stage](call, **more.get(stage, {}))
            except OutOfTime:
                break
            finally:
                log["stages"][stage] = round(time.monotonic() - start, 1)
                print(f"{stage}: {log['stages'][stage]} s", flush=True)
            waiting.pop(0)
            if log["stages"][stage] > 5:
                call.save()
                pack(call.work, call.out)  # what comes back where somebody else ends the call
    finally:
        log |= {"seconds": round(time.monotonic() - began, 1), "next": waiting[0] if waiting else ""}
        call.save()
        try:
            if "report" in arguments.stages:
                report(call)
        except SystemExit as error:  # the files must come back all the same
            print(error, flush=True)
        for path in pack(call.work, call.out):
            print(f"{path} {path.stat().st_size:,} bytes")
    done = waiting in ([], ["report"])
    print("all done" if done else f"next: {waiting[0]}", flush=True)
    return 0 if done else 3


if __name__ == "__main__":
    main()
