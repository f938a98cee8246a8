"""The stages of paper_size.py: each does what is still missing, as far as its minutes hold; True where all is there."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
from paper_size_run import (
    COMPARED,
    EXPERIMENT,
    ROLES,
    SKIPPED,
    START_SECONDS,
    Job,
    Run,
    in_turn,
    plan_training,
)

VARIANTS = {
    "guidance": ("plain", "half_weights", "compiled_half_weights", "full", "compiled"),
    "training": ("plain_workers", "ours", "compiled"),
}
"""Of bench/gpu.py, the most telling ones first."""
TOY_VARIANTS = {"guidance": ("plain", "full")}
GUESSES = {"speed eager": 25.0, "speed compiled": 100.0}
"""Seconds of a measurement before one was made."""
LEAST_FORWARD = 32
"""Images of figs. 1 to 4, where the time does not hold all."""
PATIENCE = 2.0
"""A training is ended, to go on in the next call, at this times its stage's minutes; nothing can be drawn before."""


def train(run: Run) -> bool:
    """Data set, U-Net, classifiers; the U-Net once more in bfloat16, which is what all stages draw with."""
    from nrcg.layout import CLASSIFIER_FILES

    roles = [role for role in ROLES if not all((run.classifiers / role / name).exists() for name in CLASSIFIER_FILES)]
    exported = run.ddpm / "training.json"
    if exported.exists() and not roles:
        return True
    began, threads = time.monotonic(), 1 if run.toy else os.cpu_count() or 1
    end = began + PATIENCE * run.budgets["train"]
    flags = ("--experiment", EXPERIMENT)
    try:
        _data(run, threads)
        config, train_config = run.config(), run.config("train")
        for role in roles:
            folder = run.classifiers / role
            words = ("train-classifier", "--config", config, *flags, "--role", role, "--data", run.data)
            run.start(role, [*words, "--threads", max(threads // 8, 1), "--out", folder])
        if not exported.exists():
            data, folder = _unet_data(run, train_config, threads), run.work / "ddpm"
            words = ("train-ddpm", "--config", train_config, *flags, "--data", data)
            run.start("ddpm", [*words, "--threads", threads, "--out", folder])
            run.wait("ddpm", min(end, run.end) - time.monotonic())
            run.start("export", ["export-ddpm", "--ddpm", folder, "--out", run.ddpm, "--name", "SportBalls 64 x 64"])
            run.wait("export", run.end - time.monotonic())
        for role in roles:
            run.wait(role, min(end + 60, run.end) - time.monotonic())
    finally:
        run.account("train", time.monotonic() - began)
    return True


def _data(run: Run, threads: int) -> None:
    """The data set; beside it the training's speed, and what it holds in the time that is left."""
    began = time.monotonic()
    if not (run.data / "dataset.json").exists():
        words = ("dataset", "--config", run.config(), "--experiment", EXPERIMENT, "--threads", threads)
        run.start("dataset", [*words, "--out", run.data])
    if "plan" not in run.state:
        block = run.block()
        number, batch = block["dataset"]["num_train"], run.settings("train_ddpm").ddpm.batch_size
        speed = 0.0 if run.arguments.pretrained else training_speed(run, batch)
        seconds = run.budgets["train"] - (time.monotonic() - began)
        if run.toy:
            seconds = START_SECONDS + 2.0
        run.state |= {"images_per_second": speed, "plan": plan_training(speed, seconds, number, batch)}
        run.save()
        print(
            f"train: {speed:.0f} images/s; {run.state['plan'][0]} epochs of {run.state['plan'][1]} images", flush=True
        )
    run.wait("dataset", run.end - time.monotonic())


def training_speed(run: Run, batch_size: int) -> float:
    """Images per second of the U-Net's training, on this device, while nothing else computes on it."""
    import torch
    import training_speed as bench

    size, seconds = (16, 0.5) if run.toy else (64, 6.0)
    settings = {"batch_size": batch_size, "size": size, "seconds": seconds, "device": "auto", "toy": run.toy}
    speed = bench.measure(argparse.Namespace(variant="ours", **settings))["images_per_second"]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return speed


def _unet_data(run: Run, config: Path, threads: int) -> Path:
    """The images that the U-Net is trained on: the data set's first, drawn again (an image depends on its number)."""
    if run.arguments.pretrained:
        return run.data
    folder = run.work / "data" / run.block("train")["dataset"]["name"]
    if not (folder / "dataset.json").exists():
        words = ("dataset", "--config", config, "--experiment", EXPERIMENT, "--threads", threads)
        run.start("first images", [*words, "--out", folder])
        run.wait("first images", run.end - time.monotonic())
    return folder


def _steps(name: str) -> Any:
    from nrcg.cli.imports import import_step

    return import_step(name, compute=True)


def _sample_job(run: Run, kind: str, method: str, scale: float, shard: int, samples: Path) -> Job:
    """A shard of a method at a scale; `kind` is of the settings, `sweep` or `main`."""
    from nrcg.layout import record_of, setting_folder

    settings = run.settings("sample", method, kind)
    if kind == "main":
        settings = settings.model_copy(update={"sampling": with_samples(run, settings.sampling)})
    guidance, sampling = settings.guidance, settings.sampling
    steps = guidance.sampler.count(_num_steps(run)) or _num_steps(run)
    passed = "unguided" if guidance.classifier is None else guidance.input
    out = setting_folder(samples, method, scale) / f"shard{shard:04d}.npy"

    def draw() -> None:
        classifier = None if guidance.classifier is None else run.classifiers / guidance.classifier
        _steps("sample").sample_shard(
            settings, scale=scale, shard=shard, ddpm=run.ddpm, classifier=classifier, out=out, **run.computing()
        )

    count = min(sampling.shard_size, sampling.num_samples - shard * sampling.shard_size)
    amount = count * steps * (SKIPPED if guidance.skip_above < 1 else 1.0)
    return Job(record_of(out), draw, passed, amount)


def with_samples(run: Run, sampling: Any, number: int | None = None) -> Any:
    """The settings of a sampling of table 2's number of samples, or of another number."""
    return sampling.model_copy(update={"num_samples": number or _table_samples(run, sampling.shard_size)})


def _table_samples(run: Run, shard_size: int) -> int:
    return 2 * shard_size if run.toy else run.arguments.samples


def _num_steps(run: Run) -> int:
    return run.settings("train_ddpm").ddpm.schedule.num_train_timesteps


def _reference(run: Run) -> Job:
    """What every setting is compared with: the training images as the judge sees them."""
    out = run.work / "reference.json"

    def describe() -> None:
        settings, folders = run.settings("reference"), {"data": run.data, "classifiers": run.classifiers}
        _steps("reference").describe_reference(settings, **folders, out=out, device=run.device())

    return Job(out, describe, "reference")


def _evaluate(run: Run, settings: Any, scale: float, samples: Path, out: Path) -> None:
    """Metrics of a setting's samples, as `nrcg evaluate` writes them."""
    folders = {"data": run.data, "classifiers": run.classifiers, "ddpm": run.ddpm, "samples": samples}
    step, reference = _steps("evaluate"), run.work / "reference.json"
    step.evaluate_method(settings, scales=[scale], reference=reference, device=run.device(), out=out, **folders)


def class_shares(run: Run, folder: Path, number: int, steps: int, out: Path) -> None:
    """A table of the classes that the judge sees among unguided samples, with 95 % intervals."""
    from nrcg.classifiers.logits import predict, predicted_class
    from nrcg.classifiers.storage import open_classifier
    from nrcg.csv_files import write_csv
    from nrcg.data.shards import read_samples
    from nrcg.evaluation.intervals import share

    judge = open_classifier(run.classifiers / "judge").to(run.device())
    seen = predicted_class(predict(judge, read_samples(folder, number).images))
    rows = []
    for index, name in enumerate(judge.classes):
        found = share(seen == index)
        low, high = found.interval
        row = {"class": name, "share": found.value, "share_lo": low, "share_hi": high}
        rows.append(row | {"num_samples": number, "steps": steps})
    write_csv(out, rows, list(rows[0]))


def sweep(run: Run) -> bool:
    """Fig. 8: every method at its scales, drawn and measured one after the other."""
    from nrcg.layout import format_scale, setting_folder

    samples, jobs = run.work / "samples" / "sweep", [_reference(run)]
    for method, scale in in_turn(run.block()["sweep"]):
        settings = run.settings("evaluate", method, "sweep")
        draw = _sample_job(run, "sweep", method, scale, 0, samples)
        jobs.append(draw)
        table = run.work / "metrics" / "sweep" / f"{method}@{format_scale(scale)}.csv"
        measure = functools.partial(_evaluate, run, settings, scale, samples, table)
        jobs.append(Job(table, measure, "evaluate", needs=draw.makes))
        if method == "unconditional":
            folder, count = setting_folder(samples, method, scale), settings.sampling.num_samples
            steps, out = settings.guidance.sampler.count(_num_steps(run)), run.tables / "class_shares_sweep.csv"
            jobs.append(Job(out, functools.partial(class_shares, run, folder, count, steps, out), "shares"))
    return run.do("sweep", jobs)


def best_scales(run: Run) -> dict[str, float]:
    """The scale of lowest cfd of each method of table 2 in the sweep; where none is measured, the first to try."""
    from nrcg.report.best import best_per_method
    from nrcg.report.columns import read_metrics

    rows = [row for path in sorted((run.work / "metrics" / "sweep").glob("*.csv")) for row in read_metrics(path)]
    found = best_per_method(rows) if rows else {}
    first = run.block()["sweep"]
    return {name: float(found[name]["scale"]) if name in found else float(first[name][0]) for name in COMPARED}


def best(run: Run) -> bool:
    """Table 2: a shard of each method in turn, so that all have as many samples wherever the time ends."""
    from nrcg.layout import setting_folder

    if "best_scales" not in run.state:
        run.state["best_scales"] = best_scales(run)
        run.save()
    samples, scales = run.work / "samples" / "best", run.state["best_scales"]
    size = run.settings("sample", COMPARED[0]).sampling.shard_size
    number = _table_samples(run, size)
    shards = range(math.ceil(number / size))
    jobs = [[_sample_job(run, "main", name, scales[name], shard, samples) for name in COMPARED] for shard in shards]
    measuring = len(COMPARED) * run.state["pace"].get("evaluate", 0.0)
    whole = run.do("best", [job for turn in jobs for job in turn], keep=measuring)
    turns = next((turn for turn in shards if not all(job.makes.exists() for job in jobs[turn])), len(shards))
    count = min(number, turns * size)
    if not count:
        return False
    tables = [_reference(run)]
    for method in COMPARED:
        settings = run.settings("evaluate", method)
        settings = settings.model_copy(update={"sampling": with_samples(run, settings.sampling, count)})
        table = run.work / "metrics" / "best" / f"{method}@{count}.csv"
        tables.append(Job(table, functools.partial(_evaluate, run, settings, scales[method], samples, table), "table"))
    out = run.tables / f"class_shares_{count}.csv"
    folder = setting_folder(samples, COMPARED[0], scales[COMPARED[0]])
    shares = functools.partial(class_shares, run, folder, count, _num_steps(run), out)
    return run.do("best", [*tables, Job(out, shares, "shares")]) and whole


def forward(run: Run) -> bool:
    """Figs. 1 to 4, on fewer images where the time does not hold all."""
    out, settings = run.tables / "forward.csv", run.settings("forward")
    if out.exists():
        return True
    # A trajectory takes a gradient through the U-Net at each step, and those of the classifiers alone.
    each = 1.1 * run.state["pace"].get("pred_x0", 0.0) * _num_steps(run)
    asked = settings.forward.num_images
    count = min(asked, int(run.left("forward") / each) if each else asked)
    if count < min(LEAST_FORWARD, asked):
        return False
    settings = settings.model_copy(update={"forward": settings.forward.model_copy(update={"num_images": count})})
    folders = {"data": run.data, "ddpm": run.ddpm, "classifiers": run.classifiers}

    def analyse() -> None:
        _steps("forward").analyse_forward(settings, out=out, **folders, **run.computing())

    return run.do("forward", [Job(out, analyse, "forward", count)])


def speed(run: Run) -> bool:
    """bench/gpu.py, one measurement after the other; those of compiled networks take a minute or two each."""
    flags, jobs = gpu.TOY if run.toy else gpu.FLAGS, []
    if not run.toy:
        run.state["pace"] = GUESSES | run.state["pace"]
    for kind, variants in (TOY_VARIANTS if run.toy else VARIANTS).items():
        for variant in variants:
            out = run.work / "speed" / f"{kind} {variant}.json"
            compiled = "compiled" if variant.startswith("compiled") else "eager"
            measure = functools.partial(_measure_speed, kind, variant, flags[kind], out)
            jobs.append(Job(out, measure, f"speed {compiled}"))
    return run.do("speed", jobs)


def _measure_speed(kind: str, variant: str, flags: tuple[str, ...], out: Path) -> None:
    from nrcg.files import atomic_write_text

    atomic_write_text(out, json.dumps(gpu.run(kind, variant, flags)) + "\n")


def speed_table(run: Run) -> str:
    """The Markdown table of bench/gpu.py, of what was measured beside its plain variant, and all numbers as speed.json;
    empty without any."""
    found: dict[tuple[str, str], list[dict]] = {}
    for kind, variants in VARIANTS.items():
        for variant in variants:
            path = run.work / "speed" / f"{kind} {variant}.json"
            if path.exists() and (variant == variants[0] or (kind, variants[0]) in found):
                found[kind, variant] = [json.loads(path.read_text())]
    if not found:
        return ""
    numbers = {" ".join(name): runs for name, runs in found.items()}
    (run.out / "speed.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return gpu.table(found)


STAGES: dict[str, Callable[[Run], bool]] = {
    "train": train,
    "sweep": sweep,
    "best": best,
    "forward": forward,
    "speed": speed,
}
