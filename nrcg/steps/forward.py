"""The forward analysis (figs. 1 to 4)."""

from __future__ import annotations

from pathlib import Path

import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import PUBLISHED_STEPS, ForwardStep, stabilizer_name
from nrcg.csv_files import write_csv
from nrcg.data.arrays import open_split, to_unit
from nrcg.guidance import stabilizers
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.sensitivity import forward_analysis
from nrcg.pipeline.progress import Progress
from nrcg.report.columns import FORWARD_COLUMNS
from nrcg.steps.common import checked_data, log_dataset


def analyse_forward(
    settings: ForwardStep,
    *,
    data: Path,
    ddpm: Path,
    classifiers: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
) -> list[dict]:
    """Accuracy, logit and gradient sensitivity along the forward process.

    Args:
        settings: The experiment's settings.
        data: Folder of the data set, whose first validation images are taken.
        ddpm: Folder of the diffusion model.
        classifiers: Folder that holds the classifiers `robust` and `non_robust`.
        out: forward.csv.
        device: Device that computes.
        precision: Autocast of the U-Net.

    Returns:
        The rows of forward.csv.
    """
    config = settings.forward
    pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device).with_weights(settings.unet_weights)
    schedule = pipe.schedule()
    models = {role: open_classifier(classifiers / role) for role in ("robust", "non_robust")}
    manifest = checked_data(data)
    images, labels = open_split(data, "val")
    count = min(config.num_images, len(images))
    passes = count * schedule.num_steps * (2 if config.noise == "per_step" else 1)
    steps = PUBLISHED_STEPS if settings.betas_per_step else schedule.num_steps
    smoothing = {stabilizer_name(entry): stabilizers.from_config(entry, steps) for entry in config.stabilizers}
    with (
        tracking.run(settings.experiment, "forward", kind="forward", params=settings.model_dump()) as run,
        Progress("forward", count * schedule.num_steps, "step") as bar,
    ):
        log_dataset(run, manifest, data, "val", "forward analysis")
        rows = forward_analysis(
            to_unit(images[:count]).to(device),
            torch.from_numpy(labels[:count]).to(device),
            classifiers={role: model.to(device) for role, model in models.items()},
            predict_noise=pipe.noise_predictor(precision, pipe.resolve_compile(settings.compile, 3 * passes)),
            schedule=schedule,
            stabilizers=smoothing,
            target=class_index(models["non_robust"].classes, settings.target),
            seed=config.seed,
            batch_size=config.batch_size,
            clip_pred_x0=settings.clip_pred_x0,
            noise=config.noise,
            on_step=bar.set,
        )
        write_csv(out, rows, FORWARD_COLUMNS)
        for row in rows:
            run.log_metrics({f"{row['method']}.{key}": row[key] for key in FORWARD_COLUMNS[3:]}, step=row["t"])
        run.log_artifact(out)
    return rows
