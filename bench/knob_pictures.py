"""The pictures of docs/guidance.md: one a knob, a row of samples for each of its values, the same seeds in each row.

    python bench/knob_pictures.py --models models/quickstart --out docs/images

Where nothing else is said: the non-robust classifier on the denoised image, EMA 0.99 (at 400 steps), scale 2, all
steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NUM_SAMPLES = 14
BASE = {"role": "non_robust", "scale": 2.0, "input": "pred_x0", "stabilizer": "ema99", "sampler": "ddpm", "share": 1.0}

KNOBS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "scale": [(f"scale {scale:g}", {"scale": scale}) for scale in (0.0, 0.5, 2.0, 4.0, 8.0, 16.0)],
    "input": [
        ("robust, x_t, scale 20", {"role": "robust", "input": "x_t", "stabilizer": "none", "scale": 20.0}),
        ("non-robust, x_t, scale 1", {"input": "x_t", "stabilizer": "none", "scale": 1.0}),
        ("non-robust, x_t, scale 5", {"input": "x_t", "stabilizer": "none", "scale": 5.0}),
        ("non-robust, pred_x0, scale 2", {"stabilizer": "none"}),
    ],
    "stabilizer": [
        ("none, scale 2", {"stabilizer": "none"}),
        ("none, scale 8", {"stabilizer": "none", "scale": 8.0}),
        ("EMA 0.9, scale 8", {"stabilizer": "ema90", "scale": 8.0}),
        ("EMA 0.99, scale 8", {"scale": 8.0}),
        ("ADAM, scale 0.1", {"stabilizer": "adam", "scale": 0.1}),
        ("ADAM debiased, scale 0.1", {"stabilizer": "adam_debiased", "scale": 0.1}),
        ("unit norm, scale 10", {"stabilizer": "unit_norm", "scale": 10.0}),
        ("norm clip 10, scale 4", {"stabilizer": "norm_clip", "scale": 4.0}),
        ("adaptive clip + EMA, scale 8", {"stabilizer": "adaptive_clip_ema99", "scale": 8.0}),
    ],
    "grad_mode": [
        ("full (checkpoint is the same)", {}),
        ("no_jacobian, scale 0.5", {"guidance": {"grad_mode": "no_jacobian"}, "scale": 0.5}),
        ("no_jacobian, scale 2", {"guidance": {"grad_mode": "no_jacobian"}}),
    ],
    "savings": [
        ("a gradient at each step", {}),
        ("every_k 2", {"guidance": {"every_k": 2}}),
        ("every_k 4", {"guidance": {"every_k": 4}}),
        ("every_k 8", {"guidance": {"every_k": 8}}),
        ("skip_above 0.999", {"guidance": {"skip_above": 0.999}}),
        ("skip_above 0.9", {"guidance": {"skip_above": 0.9}}),
    ],
    "scale_schedule": [
        ("constant", {}),
        ("linear to 0", {"schedule": "linear:0"}),
        ("noisy half alone: interval 0.5, 1", {"schedule": "interval:0.5,1"}),
        ("clean half alone: interval 0, 0.5", {"schedule": "interval:0,0.5"}),
    ],
    "sampler": [
        ("DDPM, all 100 steps", {}),
        ("DDPM, 25 steps, scale 4", {"share": 0.25, "scale": 4.0}),
        ("DDIM, 25 steps, scale 2", {"sampler": "ddim", "share": 0.25}),
        ("DPM-Solver++, 12 steps, scale 1", {"sampler": "dpmpp", "share": 0.12, "scale": 1.0}),
    ],
    "start": [
        ("data_mean", {"start": "data_mean"}),
        ("standard_normal", {"start": "standard_normal"}),
    ],
    "clip_pred_x0": [
        ("clipped", {}),
        ("not clipped", {"guidance": {"clip_pred_x0": False}}),
    ],
}


def stabilizer(name: str, num_steps: int) -> Any:
    """A stabilizer with betas for this number of steps."""
    from nrcg import EMA, Adam, AdaptiveClip, Chain, Identity, NormClip, UnitNorm
    from nrcg.config import scaled_beta

    adam = (scaled_beta(0.9, num_steps), scaled_beta(0.999, num_steps), 1e-4)
    return {
        "none": Identity(),
        "ema90": EMA(scaled_beta(0.9, num_steps)),
        "ema99": EMA(scaled_beta(0.99, num_steps)),
        "adam": Adam(*adam),
        "adam_debiased": Adam(*adam, debias=True),
        "unit_norm": UnitNorm(),
        "norm_clip": NormClip(10.0),
        "adaptive_clip_ema99": Chain(AdaptiveClip(2.0, 0.9), EMA(scaled_beta(0.99, num_steps))),
    }[name]


def draw(models: Path, target: str, setting: dict[str, Any]) -> Any:
    """(N, H, W, C) uint8 samples of one row."""
    from nrcg import ClassifierGuidance, GuidedDDPMPipeline, load_classifier
    from nrcg.classifiers.logits import class_index
    from nrcg.data.arrays import to_uint8
    from nrcg.guidance.scales import parse

    values = BASE | setting
    pipe = GuidedDDPMPipeline.from_pretrained(models / "ddpm").use_sampler(values["sampler"])
    steps = round(values["share"] * len(pipe.scheduler.betas))
    classifier = load_classifier(models / "classifiers" / values["role"])
    guidance = ClassifierGuidance(
        classifier,
        class_index(classifier.classes, target),
        parse(values.get("schedule", "constant"), values["scale"]),
        input=values["input"],
        stabilizer=stabilizer(values["stabilizer"], steps),
        **values.get("guidance", {}),
    )
    out = pipe(
        num_samples=NUM_SAMPLES,
        batch_size=NUM_SAMPLES,
        seed=1,
        guidance=guidance,
        num_inference_steps=None if values["share"] == 1.0 else steps,
        start=values.get("start", "auto"),
        on_step=lambda done: None,
    )
    return to_uint8(out.samples)


def save_rows(path: Path, rows: list[tuple[str, Any, float]]) -> None:
    """Rows of samples with their labels and the judge's accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9.5, 0.66 * len(rows) + 0.1), squeeze=False)
    for (label, images, accuracy), place in zip(rows, axes[:, 0], strict=True):
        place.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
        place.set(xticks=[], yticks=[])
        place.set_ylabel(f"{label}\n{100 * accuracy:.0f} %", rotation=0, ha="right", va="center", fontsize=8)
        for spine in place.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(left=0.24, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models/quickstart"))
    parser.add_argument("--target", default="baseball")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--knobs", nargs="+", choices=KNOBS, default=list(KNOBS))
    arguments = parser.parse_args()
    from nrcg import load_classifier
    from nrcg.classifiers.logits import class_index, predict, target_share

    judge = load_classifier(arguments.models / "classifiers" / "judge")
    target = class_index(judge.classes, arguments.target)
    for knob in arguments.knobs:
        rows = []
        for label, setting in KNOBS[knob]:
            images = draw(arguments.models, arguments.target, setting)
            rows.append((label, images, target_share(predict(judge, images), target)))
        save_rows(arguments.out / f"knob_{knob}.png", rows)
        print(knob, [f"{label}: {accuracy:.2f}" for label, _, accuracy in rows], flush=True)


if __name__ == "__main__":
    main()
