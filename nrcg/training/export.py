"""Trained models in a form small enough to hand on: half precision, in pieces, with a model card.

Half precision halves the files, not the arithmetic: an exported model opens in float32 like any other.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from torch import nn

from nrcg.classifiers.storage import open_classifier, read_classifier_config, save_classifier
from nrcg.diffusion.storage import DATA_MEAN_FILE
from nrcg.errors import DataError
from nrcg.files import atomic_write_text, read_record, replace_folder, sha256_file, temporary_name, write_record

MAX_SHARD_BYTES = 16_000_000
"""Hosts of code refuse or warn of larger files."""
_HEADER_BYTES = 100_000  # a shard's list of tensors
_COPIED = (DATA_MEAN_FILE, "training.csv", "samples.png")


def export_ddpm(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    name: str | None = None,
) -> Path:
    """Write a diffusion model's folder again, its U-Net in half precision and in files below a size.

    diffusers' `DDPMPipeline.from_pretrained` opens the result, and gives float32 weights. The mean training image and
    the training's record come along; README.md becomes the model card.

    Args:
        folder: a diffusers pipeline, such as models/<experiment>/ddpm.
        out: the new folder; one that is there is replaced.
        dtype: of the weights on disk.
        max_shard_bytes: no weights' file is larger.
        name: title of the model card; None: the experiment's name, or the folder's.

    Raises:
        DataError: no pipeline, weights that are not finite in `dtype`, or one tensor larger than a file may be.
    """
    from diffusers import DDPMPipeline

    from nrcg.guidance.pipeline import GuidedDDPMPipeline

    folder, out = Path(folder), Path(out)
    pipe = GuidedDDPMPipeline.from_pretrained(folder)
    unet = nn.Module.to(pipe.unet, dtype)  # diffusers' own .to warns of layers that no UNet2DModel has
    _check_finite(unet, folder, dtype)
    largest = max(tensor.numel() * tensor.element_size() for tensor in unet.state_dict().values())
    if largest + _HEADER_BYTES > max_shard_bytes:
        raise DataError(
            f"{folder}: one tensor alone takes {largest:,} bytes; allow files larger than {max_shard_bytes:,}"
        )
    new = temporary_name(out)
    try:
        DDPMPipeline(unet, pipe.scheduler).save_pretrained(new, max_shard_size=max_shard_bytes - _HEADER_BYTES)
        for file in _COPIED:
            if (folder / file).exists():
                shutil.copy(folder / file, new / file)
        record = _read_record(folder / "training.json")
        weights = sorted((new / "unet").glob("*.safetensors"))
        exported = {"dtype": str(dtype).removeprefix("torch."), "from_sha256": record.get("sha256")}
        sums = {path.relative_to(new).as_posix(): sha256_file(path) for path in new.rglob("*") if path.is_file()}
        record |= {"sha256": _joint_sha256(weights), "exported": exported, "files": sums}
        write_record(new / "training.json", record)
        title = name or record.get("settings", {}).get("experiment") or folder.name
        atomic_write_text(new / "README.md", model_card(title, record, unet))
        replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return out


def export_classifier(folder: str | Path, out: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a saved classifier again with weights in half precision; `load_classifier` gives float32 weights.

    Raises:
        DataError: no classifier, or weights that are not finite in `dtype`.
    """
    folder, out = Path(folder), Path(out)
    config = read_classifier_config(folder)
    module = open_classifier(folder).module.to(dtype)
    _check_finite(module, folder, dtype)
    exported = {"dtype": str(dtype).removeprefix("torch."), "from_sha256": config.get("sha256")}
    out.mkdir(parents=True, exist_ok=True)
    for file in ("training.csv", "accuracy_over_t.csv"):
        if (folder / file).exists():
            shutil.copy(folder / file, out / file)
    save_classifier(out, module, config | {"exported": exported})
    return out


def model_card(title: str, record: dict, unet: nn.Module) -> str:
    """README.md of an exported diffusion model, from its training's record.

    Args:
        record: training.json; what it does not say is left out of the card.
    """
    settings = record.get("settings", {})
    ddpm, schedule = settings.get("ddpm", {}), settings.get("ddpm", {}).get("schedule", {})
    size, channels = unet.config.sample_size, unet.config.in_channels
    facts = [
        ("images", f"{size} x {size}, {channels} channels, in [-1, 1]"),
        ("parameters", f"{sum(p.numel() for p in unet.parameters()):,}, stored as {record['exported']['dtype']}"),
        ("data set", record.get("dataset", {}).get("dataset")),
        ("diffusion steps T", schedule.get("num_train_timesteps")),
        ("betas, linear", schedule and f"{schedule['beta_start']:g} to {schedule['beta_end']:g}"),
        ("epochs", record.get("epochs_done") or ddpm.get("epochs")),
        ("batch size", ddpm.get("batch_size")),
        ("learning rate", ddpm.get("optimizer", {}).get("learning_rate")),
        ("trained on", record.get("device")),
        ("SHA-256 of the weights", record["sha256"]),
    ]
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts if value)
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: mit
tags: [ddpm, classifier-guidance, nrcg]
---

# {title}: unconditional DDPM

A diffusers pipeline (`DDPMPipeline`), trained by nrcg without any class label. The weights are the exponential moving
average of the training's. `data_mean.npy` is the mean training image, for nrcg's start `data_mean`.

| | |
|---|---|
{rows}

```bash
nrcg sample --ddpm FOLDER --num-samples 16 --seed 0 --out samples                      # unguided
nrcg sample --ddpm FOLDER --classifier CLASSIFIER --target CLASS --scale 10 --stabilizer ema:0.99 --out samples
```

```python
from nrcg import GuidedDDPMPipeline

pipe = GuidedDDPMPipeline.from_pretrained("FOLDER")  # float32 weights, rounded to {record["exported"]["dtype"]}
```

Made to study guidance, on one small data set: it draws nothing else, and nobody checked it for any other use.
`training.json` holds all settings and versions, `training.csv` the losses.
"""


def _read_record(path: Path) -> dict:
    """training.json, or nothing where somebody else trained the model."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error})") from None


def _joint_sha256(paths: list[Path]) -> str:
    """One digest of several files: of the only one, or of their digests in order."""
    digests = [sha256_file(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_finite(module: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{folder}: {name} is not finite in {str(dtype).removeprefix('torch.')}")
