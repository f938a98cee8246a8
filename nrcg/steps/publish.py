"""A model's folder for the hub: weights, card, samples, the pipeline file; pushed where a token is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nrcg.classifiers.storage import open_classifier
from nrcg.config import scaled_beta
from nrcg.data.arrays import to_uint8
from nrcg.data.pictures import sample_grid, save_png
from nrcg.diffusion.storage import DATA_MEAN_FILE, RECORD_FILE
from nrcg.errors import ConfigError, DataError
from nrcg.files import atomic_write_text, naming, read_record, replace_folder, temporary_name
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.stabilizers import EMA
from nrcg.pipeline.progress import Progress
from nrcg.report.card import PIPELINE_FILE, Card
from nrcg.report.columns import read_metrics

SHARD_SIZE = "4GB"
"""Of the weights' files, at most; diffusers puts them together again."""
GRID_COLUMNS = 8
GAP = 12
"""Pixels between unguided and guided samples."""
WRITTEN = (
    *("README.md", "samples.png", "pipeline.py", "metrics.csv", "training.csv", DATA_MEAN_FILE, "model_index.json"),
    *("unet", "scheduler", "classifiers", ".cache", ".git", ".gitattributes"),
)
"""What a published folder holds, and what the hub's clients leave in it."""
ZOOMED = 64
"""Pixels that an image of the picture has at least."""


@dataclass(frozen=True)
class Publication:
    """What is published.

    Attributes:
        ddpm: Folder of the diffusion model.
        name: USER/NAME of the hub.
        license: By the hub's name.
        classifiers: Folders that go with it.
        target: Class of the guided samples, of the first classifier; None: its first class.
        metrics: A metrics.csv; None: no table.
        num_samples: Of the picture: unguided ones, and below as many guided ones where there is a classifier.
        num_inference_steps: None: all.
        scale: Of the guided samples.
        shard_size: Largest file of weights, as diffusers writes it.
    """

    ddpm: Path
    name: str
    license: str = "mit"
    classifiers: tuple[Path, ...] = field(default_factory=tuple)
    target: str | None = None
    metrics: Path | None = None
    num_samples: int = 16
    num_inference_steps: int | None = None
    scale: float = 5.0
    shard_size: str = SHARD_SIZE


def publish(what: Publication, *, out: Path, device: torch.device, dtype: str | None = None) -> Card:
    """Write a folder that the hub, diffusers and nrcg open.

    Args:
        what: See there.
        out: The folder; written as a whole, what is there is replaced if it is such a folder.
        device: Device that draws the samples.
        dtype: Type of the U-Net's weights, such as bfloat16; None: as they are.

    Raises:
        DataError: A folder that cannot be opened, or `out` holds something else.
    """
    _check_replaceable(out)
    pipe = GuidedDDPMPipeline.from_pretrained(what.ddpm)
    rows = None if what.metrics is None else read_metrics(what.metrics)
    classifiers = {folder.name: open_classifier(folder) for folder in what.classifiers}
    if len(classifiers) < len(what.classifiers):
        raise ConfigError("--classifier: two folders of one name; rename one")
    target = _target(what.target, classifiers)
    card = Card(
        name=what.name,
        license=what.license,
        shape=pipe.image_shape(),
        scheduler=type(pipe.scheduler).__name__,
        training=_training(what.ddpm),
        metrics=rows,
        classifiers={name: one.classes for name, one in classifiers.items()},
        target=target,
        scale=what.scale,
        beta=_beta(pipe, None),
    )
    new = temporary_name(out)
    try:
        with naming(out):
            pipe.with_weights(dtype).save_pretrained(new, max_shard_size=what.shard_size)
            for name in (DATA_MEAN_FILE, "training.csv"):
                if (what.ddpm / name).exists():
                    shutil.copy2(what.ddpm / name, new / name)
            for folder in what.classifiers:
                shutil.copytree(folder, new / "classifiers" / folder.name)
            if what.metrics is not None:
                shutil.copy2(what.metrics, new / "metrics.csv")
            atomic_write_text(new / "pipeline.py", PIPELINE_FILE)
            atomic_write_text(new / "README.md", card.text())
            _draw(pipe.to(device), what, new / "samples.png", next(iter(classifiers.values()), None), target)
            replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return card


def _check_replaceable(out: Path) -> None:
    """Refuse to write over anything but a folder that this has written. Raises DataError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    marker = out / "pipeline.py"
    ours = out.is_dir() and marker.is_file() and marker.read_text(errors="replace") == PIPELINE_FILE
    others = sorted({path.name for path in out.iterdir()} - set(WRITTEN)) if ours else []
    if not ours or others:
        holds = f" ({', '.join(others[:3])})" if others else ""
        raise DataError(f"{out}: is there and is no published folder{holds}; give another --out")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a published folder.

    Returns:
        Its address.

    Raises:
        ConfigError: No token, or no network.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConfigError(f"no token of the hub; the folder {folder} is whole: set HF_TOKEN or run `hf auth login`")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # of the client, of whatever carries it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{repo}: not pushed ({reason}); the folder {folder} is whole, push it again") from error
    return f"{api.endpoint}/{repo}"


def _target(target: str | None, classifiers: Mapping[str, Any]) -> str | int | None:
    """The class of the guided samples, by number where it has no name."""
    first = next(iter(classifiers.values()), None)
    if first is None:
        if target is not None:
            raise ConfigError("--target: nothing guides; give --classifier")
        return None
    classes = first.classes or [str(index) for index in range(first.count_classes())]
    if target is not None and target not in classes:
        raise ConfigError(f"--target: {target!r} is no class; allowed: {', '.join(classes[:20])}")
    chosen = target or classes[0]
    return chosen if first.classes else int(chosen)


def _training(folder: Path) -> dict[str, str]:
    """What a card says of a training, by the record that lies with the model, where one does."""
    path = folder / RECORD_FILE
    record = read_record(path) if path.exists() else {}
    told = {"dataset": record.get("dataset", {}), **record.get("settings", {}).get("ddpm", {})}
    told |= {name: record[name] for name in ("precision", "device", "versions") if name in record}
    return {name: _told(value) for name, value in told.items() if value not in (None, {})}


def _told(value: Any) -> str:
    """A setting in one line."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)


def _draw(
    pipe: GuidedDDPMPipeline, what: Publication, path: Path, classifier: Any | None, target: str | int | None
) -> None:
    """samples.png: unguided ones, and below guided ones."""
    guidances: list[ClassifierGuidance | None] = [None]
    if classifier is not None:
        guidances.append(
            ClassifierGuidance(
                classifier, target, scale=what.scale, stabilizer=EMA(_beta(pipe, what.num_inference_steps))
            )
        )
    images = []
    steps = len(pipe.timesteps(what.num_inference_steps))
    with Progress("samples", steps * what.num_samples * len(guidances), "step") as bar:
        for number, guidance in enumerate(guidances):
            before = number * steps * what.num_samples
            found = pipe(
                what.num_samples,
                "auto",
                guidance=guidance,
                num_inference_steps=what.num_inference_steps,
                on_step=lambda done, before=before: bar.set(before + done),
            )
            zoom = max(1, ZOOMED // found.samples.shape[-1])
            images.append(to_uint8(found.samples).repeat(zoom, axis=1).repeat(zoom, axis=2))
    grids = [sample_grid(part, min(GRID_COLUMNS, what.num_samples)) for part in images]
    white = np.full((GAP, *grids[0].shape[1:]), 255, np.uint8)
    save_png(path, np.concatenate([part for grid in grids for part in (white, grid)][1:]))


def _beta(pipe: GuidedDDPMPipeline, num_inference_steps: int | None) -> float:
    """The published EMA of 0.99 at the steps that are taken."""
    return scaled_beta(0.99, len(pipe.timesteps(num_inference_steps)))
