"""What each saving costs: judge accuracy, class-conditional Fréchet distance and time of every way to take the
gradient and of every sampler, at equal seeds, on an experiment's models.

    python bench/guidance_quality.py --models models/quickstart --data data/sportballs20 --out docs/quality

The guide is the non-robust classifier on the denoised image with EMA 0.99 (beta^(400/steps)). Each setting is drawn at
each scale of a small sweep and stands in the table at the scale with the lowest distance. Time is the process' CPU
time on one thread (on a GPU wall time), so that other work on the machine does not matter much; ratios are against
the full gradient at every step of the full DDPM.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One row: a sampler and a way to take the gradient."""

    name: str
    scales: tuple[float, ...] = (2.0, 4.0)
    sampler: str = "ddpm"
    share: float = 1.0  # of the T steps
    guidance: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("full, DDPM"),
    Setting("every_k 2", guidance={"every_k": 2}),
    Setting("every_k 4", guidance={"every_k": 4}),
    Setting("skip_above 0.999", guidance={"skip_above": 0.999}),
    Setting("skip_above 0.9", guidance={"skip_above": 0.9}),
    Setting("no_jacobian", (0.8, 0.4), guidance={"grad_mode": "no_jacobian"}),
    Setting("DDPM, 1/2 of the steps", share=0.5, scales=(4.0, 2.0, 8.0)),
    Setting("preset fast", share=0.5, scales=(4.0, 2.0, 8.0), guidance={"skip_above": 0.9}),
    Setting("DDPM, 1/4 of the steps", share=0.25, scales=(4.0, 2.0, 8.0)),
    Setting("DDIM, 1/2 of the steps", sampler="ddim", share=0.5, scales=(2.0, 1.0, 4.0)),
    Setting("DDIM, 1/4 of the steps", sampler="ddim", share=0.25, scales=(2.0, 1.0, 4.0)),
    Setting(
        "DDIM, 1/4, skip_above 0.999",
        sampler="ddim",
        share=0.25,
        scales=(2.0, 1.0, 4.0),
        guidance={"skip_above": 0.999},
    ),
    Setting("DPM-Solver++, 1/4 of the steps", sampler="dpmpp", share=0.25, scales=(2.0, 1.0, 4.0)),
    Setting("DPM-Solver++, 1/8 of the steps", sampler="dpmpp", share=0.125, scales=(2.0, 1.0, 4.0)),
    Setting(
        "DPM-Solver++, 1/8, skip_above 0.999",
        sampler="dpmpp",
        share=0.125,
        scales=(2.0, 1.0, 4.0),
        guidance={"skip_above": 0.999},
    ),
)


COLUMNS = ("accuracy_judge", "cfd_judge", "cfd_judge_lo", "cfd_judge_hi", "recall", "coverage", "diversity")


def chosen_scales(scales: tuple[float, ...], times: float, number: int | None) -> list[float]:
    """The scales of a setting, times a factor: all, or so many of the first."""
    return [times * scale for scale in scales[:number]]


def measure(arguments: argparse.Namespace, rows: list[dict], keep: Callable[[list[dict]], None]) -> list[dict]:
    """A row per setting and scale; those that are there already are not measured again.

    Args:
        keep: called with all rows after each.
    """
    import torch

    from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline, load_classifier
    from nrcg.classifiers.logits import class_index
    from nrcg.config import scaled_beta
    from nrcg.data.arrays import open_split, to_uint8
    from nrcg.devices import resolve_device, resolve_precision
    from nrcg.evaluation.evaluate import evaluate_images
    from nrcg.evaluation.features import ClassifierExtractor
    from nrcg.evaluation.references import make_reference

    device = resolve_device(arguments.device)
    precision = resolve_precision("auto", device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    models = Path(arguments.models)
    guide = load_classifier(models / "classifiers" / "non_robust").to(device)
    judge = load_classifier(models / "classifiers" / "judge").to(device)
    target = class_index(judge.classes, arguments.target)
    extractor = ClassifierExtractor(judge)
    images, labels = open_split(arguments.data, "train")
    count = arguments.num_reference
    reference = make_reference(extractor, images[:count], labels[:count], target)
    rows = list(rows)
    for setting in SETTINGS:
        for scale in chosen_scales(setting.scales, arguments.times, arguments.num_scales):
            if any((row["setting"], row["scale"]) == (setting.name, scale) for row in rows):
                continue
            pipe = GuidedDDPMPipeline.from_pretrained(models / "ddpm").to(device).use_sampler(setting.sampler)
            steps = round(setting.share * len(pipe.scheduler.betas))
            guidance = ClassifierGuidance(
                guide, target, scale, stabilizer=EMA(scaled_beta(0.99, steps)), **setting.guidance
            )
            clock = time.process_time if device.type == "cpu" else time.perf_counter
            began = clock()
            out = pipe(
                num_samples=arguments.num_samples,
                batch_size=arguments.batch_size,
                guidance=guidance,
                num_inference_steps=None if setting.share == 1.0 else steps,
                precision=precision,
                on_step=lambda done: None,
            )
            seconds = clock() - began
            drawn = to_uint8(out.samples)
            found = evaluate_images(drawn, [reference], [extractor], target=target, judge=judge)
            row = {
                "setting": setting.name,
                "scale": scale,
                "steps": steps,
                **{key: found[key] for key in COLUMNS},
                "nonfinite": int(out.nonfinite.sum()),
                "seconds_per_image": seconds / len(drawn),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
            keep(rows)
    return rows


def best(rows: list[dict]) -> list[dict]:
    """Each setting at its scale of lowest distance, with its speed against the first setting."""
    chosen = []
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting.name]
        if own:
            row = min(own, key=lambda row: row["cfd_judge"])
            # All scales cost the same: the median is steadier.
            seconds = sorted(row["seconds_per_image"] for row in own)[len(own) // 2]
            chosen.append(row | {"seconds_per_image": seconds})
    for row in chosen:
        row["speed"] = chosen[0]["seconds_per_image"] / row["seconds_per_image"]
    return chosen


def table(rows: list[dict]) -> str:
    """The best rows as Markdown."""
    lines = ["| setting | scale | steps | accuracy (judge) | cfd_judge (95 %) | speed |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {row['setting']} | {row['scale']:g} | {row['steps']:g} | {100 * row['accuracy_judge']:.1f} % |"
        f" {row['cfd_judge']:.2f} ({row['cfd_judge_lo']:.2f} to {row['cfd_judge_hi']:.2f}) |"
        f" {row['speed']:.1f} x |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    """Distance against speed, one point a setting; the front is what nothing else beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
    front = [
        row
        for row in rows
        if not any(other["speed"] > row["speed"] and other["cfd_judge"] < row["cfd_judge"] for other in rows)
    ]
    front.sort(key=lambda row: row["speed"])
    axes.plot([r["speed"] for r in front], [r["cfd_judge"] for r in front], color="#bbbbbb", zorder=1, label="front")
    markers = {"DDPM": ("o", "#0072B2"), "DDIM": ("s", "#D55E00"), "DPM-Solver++": ("^", "#009E73")}
    for row in rows:
        name = next((name for name in ("DPM-Solver++", "DDIM") if row["setting"].startswith(name)), "DDPM")
        marker, color = markers[name]
        axes.scatter(row["speed"], row["cfd_judge"], marker=marker, color=color, s=45, zorder=2)
        axes.annotate(
            f"{row['setting']} ({100 * row['accuracy_judge']:.0f} %)",
            (row["speed"], row["cfd_judge"]),
            xytext=(6, -10) if "0.999" in row["setting"] or row["setting"].startswith("full") else (6, 3),
            textcoords="offset points",
            fontsize=7.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="images per second, times the full gradient at all steps")
    axes.set(ylabel="class-conditional Fréchet distance (judge)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="models/quickstart")
    parser.add_argument("--data", default="data/sportballs20")
    parser.add_argument("--target", default="baseball")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--num-reference", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder for quality.csv, quality.md and quality.png")
    parser.add_argument("--times", type=float, default=1.0, help="all scales times this; 2 was the best at 1")
    parser.add_argument("--num-scales", type=int, help="so many scales per setting; default: all")
    parser.add_argument("--resume", action="store_true", help="go on from the quality.csv that is there")
    parser.add_argument("--draw-only", action="store_true", help="table and picture from the quality.csv that is there")
    arguments = parser.parse_args()
    from nrcg.csv_files import write_csv

    csv = arguments.out / "quality.csv"
    if arguments.draw_only:
        rows = _read(csv)
    else:
        found = _read(csv) if arguments.resume and csv.exists() else []
        rows = measure(arguments, found, lambda rows: write_csv(csv, rows, list(rows[0])))
    chosen = best(rows)
    (arguments.out / "quality.md").write_text(table(chosen))
    picture(chosen, arguments.out / "quality.png")
    print(table(chosen))


def _read(path: Path) -> list[dict]:
    import csv

    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [{name: text if name == "setting" else float(text) for name, text in line.items()} for line in lines]


if __name__ == "__main__":
    main()
