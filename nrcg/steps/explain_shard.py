"""Explanations of an experiment's validation images: one shard of one way to explain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg import tracking
from nrcg.classifiers.logits import class_index
from nrcg.classifiers.storage import open_classifier
from nrcg.config import ExplainStep
from nrcg.data.arrays import open_split
from nrcg.errors import DataError
from nrcg.explain.baselines import judged, nearest_images
from nrcg.explain.engine import work_of
from nrcg.explain.explanations import Explanations
from nrcg.explain.repeats import repeats_of
from nrcg.files import atomic_save_arrays, weights_sha256
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.steps.common import checked_data, log_dataset


@dataclass(frozen=True)
class Chosen:
    """The images that are explained, pair by pair.

    Attributes:
        rows: (N,) int64, their numbers in the validation split.
        targets: (N,) int64, the class aimed at.
        pair: (N,) int64, number of the pair.
        pairs: What each pair is called, such as "soccer to baseball".
    """

    rows: np.ndarray
    targets: np.ndarray
    pair: np.ndarray
    pairs: list[str]


def choose_images(settings: ExplainStep, labels: np.ndarray, classes: list[str]) -> Chosen:
    """The first validation images of each pair.

    Args:
        settings: Whose `explain.pairs` and `explain.num_images` count.
        labels: (M,) of the validation images.
        classes: Names of the K classes.
    """
    config, rows, targets, pair, names = settings.explain, [], [], [], []
    for number, (origin, aim) in enumerate(config.pairs or [(None, settings.target)]):
        target = class_index(classes, aim)
        own = labels != target if origin is None else labels == class_index(classes, origin)
        found = np.flatnonzero(own)[: config.num_images]
        rows.append(found)
        targets.append(np.full(len(found), target))
        pair.append(np.full(len(found), number))
        names.append(f"{origin or 'others'} to {aim}")
    return Chosen(*(np.concatenate(one).astype(np.int64) for one in (rows, targets, pair)), names)


def explain_shard(
    settings: ExplainStep,
    *,
    shard: int,
    data: Path,
    ddpm: Path,
    classifiers: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
) -> list[Explanations]:
    """One shard of the explanations of a way to explain.

    Args:
        settings: The way's settings.
        shard: Number of the shard, from 0.
        data: Folder of the data set.
        ddpm: Folder of the diffusion model.
        classifiers: Folder of the classifiers.
        out: The .npz file of the explanations, by seed.
        device: Device that computes.
        precision: Autocast of the U-Net.

    Returns:
        Explanations of the shard's images, for each seed; with `explain.noise` those of the images with noise last.
    """
    config, how, manifest = settings.explain, settings.how, checked_data(data)
    images, labels = open_split(data, "val")
    guide = open_classifier(classifiers / how.classifier).to(device)
    chosen = choose_images(settings, labels, guide.classes)
    part = slice(shard * config.shard_size, (shard + 1) * config.shard_size)
    rows, targets = chosen.rows[part], chosen.targets[part]
    if not len(rows):
        raise DataError(f"explain.num_images: shard {shard} is past the last of {len(chosen.rows)} images; lower it")
    originals = np.array(images[rows])
    params = settings.model_dump(exclude={"explain"}) | {"shard": shard, "weights_sha256": weights_sha256(ddpm)}
    with tracking.run(
        settings.experiment, f"explain {settings.explainer} shard {shard}", kind="shard", params=params, deferred=True
    ) as run:
        log_dataset(run, manifest, data, "val", "explanations")
        if how.settings() is None:
            train, train_labels = open_split(data, "train")
            nearest = nearest_images(originals, train, train_labels, targets)
            found = {"0": judged(guide, originals, nearest, targets, how.kind)}
        else:
            pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device).with_weights(settings.unet_weights)
            robust = open_classifier(classifiers / "robust").to(device) if how.cone else None
            found = _explained(settings, pipe, guide, robust, originals, targets, rows, precision)
        seconds = sum(float(one.seconds.sum()) for one in found.values())
        run.log_metrics({"seconds": seconds, "succeeded": float(found["0"].succeeded.mean())})
    arrays = {f"{run}.{name}": array for run, one in found.items() for name, array in one.arrays().items()}
    atomic_save_arrays(out, arrays | {"rows": rows})
    return list(found.values())


def _explained(
    settings: ExplainStep,
    pipe: GuidedDDPMPipeline,
    guide: torch.nn.Module,
    robust: torch.nn.Module | None,
    originals: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray,
    precision: torch.dtype,
) -> dict[str, Explanations]:
    """Explanations by the engine, for each run's name; an image's noise depends on its number in the split."""
    config, found = settings.explain, {}
    repeats = repeats_of(settings.how.settings(config.seed), config.num_seeds, config.noise)
    work = work_of(settings.how.settings(), pipe) * len(rows)
    with Progress(f"explain {settings.explainer}", work * len(repeats), "step") as bar:
        for number, repeat in enumerate(repeats):
            found[repeat.name] = repeat.explain(
                pipe,
                guide,
                originals,
                targets,
                robust=robust,
                samples=rows.tolist(),
                batch_size=config.batch_size,
                precision=precision,
                compile=settings.compile,
                on_step=lambda done, number=number: bar.set(number * work + done),
            )
            bar.set((number + 1) * work)
    return found
