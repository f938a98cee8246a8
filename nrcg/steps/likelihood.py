"""Likelihood of images under a diffusion model: bits per dimension by the bound, and by the probability flow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.config import fingerprint
from nrcg.csv_files import write_csv
from nrcg.data.arrays import to_unit
from nrcg.devices import device_name
from nrcg.diffusion.likelihood import bound, flow_bits_per_dim
from nrcg.errors import DataError
from nrcg.evaluation.sides import UNREADABLE, Side, numbered
from nrcg.files import atomic_save_arrays, atomic_write_text
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.provenance import versions

PART = 256
"""Images whose numbers are kept at a time: a killed run goes on with the part that it was at."""
ARRAYS = ("nats", "terms", "mse_eps", "mse_x0", "flow")


@dataclass(frozen=True)
class Measure:
    """How the likelihood is measured.

    Attributes:
        num_images: The first ones.
        num_steps: Terms of the bound per image between t = 2 and T, a stratified choice; None: all.
        num_traces: Random signs per image for the flow's divergence; 0: no flow.
        seed: Of noise, steps and signs, which depend on it and the image's number alone.
        batch_size: Images at once.
        precision: Autocast of the U-Net.
    """

    num_images: int
    num_steps: int | None = None
    num_traces: int = 0
    seed: int = 0
    batch_size: BatchSize = "auto"
    precision: torch.dtype = torch.float32

    def passes(self, num_steps: int) -> int:
        """What an image counts for in the progress, of T = num_steps."""
        return num_steps * (1 + 2 * bool(self.num_traces))


def measure_likelihood(pipe: GuidedDDPMPipeline, images: Side, how: Measure, *, out: Path, identity: str) -> dict:
    """Bits per dimension of images: likelihood.csv by t, images.csv by image, likelihood.json with the totals.

    Args:
        pipe: The diffusion model on its device.
        images: Of the model's size and channels.
        how: How it is measured.
        out: Folder to write to; parts that are there, of the same measurement, are taken.
        identity: What model and images are, such as their checksums.

    Returns:
        The totals, each (mean, standard error) over the images, as in likelihood.json.

    Raises:
        DataError: Images of another size, or not 8 bits.
    """
    settings = {key: value for key, value in asdict(how).items() if key not in ("batch_size", "num_images")}
    known = fingerprint(settings | {"precision": str(how.precision), "identity": identity})
    variance = str(pipe.scheduler.config.get("variance_type", "fixed_small")).removesuffix("_log")
    per_image = how.passes(pipe.schedule().num_steps)
    found: list[dict[str, np.ndarray]] = []
    with Progress("likelihood", how.num_images * per_image, "step") as bar, torch.inference_mode(False):
        predict = pipe.noise_predictor(how.precision)
        for number, x0 in _parts(pipe, images, how.num_images):
            path = out / "parts" / f"part{number:05d}.npz"
            part = _read_part(path, known, len(x0))
            if part is None:
                part = _measure_part(pipe, predict, x0, number * PART, how, variance, bar.set)
                atomic_save_arrays(path, part | {"known": np.array(known)})
            found.append(part)
            bar.set(min((number + 1) * PART, how.num_images) * per_image)
    whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return _write(pipe, whole, how, out)


def _parts(pipe: GuidedDDPMPipeline, images: Side, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and images (B, C, H, W) in [-1, 1] of each part."""
    shape = pipe.image_shape()
    waiting: list[np.ndarray] = []
    done = 0
    for _, chunk in numbered(images, count):
        for image in chunk:
            if image.shape != (*shape[1:], shape[0]):
                raise DataError(
                    f"{images.path}: holds an image of {' x '.join(map(str, image.shape))}, the model's are"
                    f" {shape[1]} x {shape[2]} x {shape[0]}; --image-size resizes"
                )
            waiting.append(image)
        while len(waiting) >= PART or (waiting and done * PART + len(waiting) == count):
            yield done, to_unit(np.stack(waiting[:PART]))
            waiting, done = waiting[PART:], done + 1


def _measure_part(
    pipe: GuidedDDPMPipeline,
    predict: Callable,
    x0: torch.Tensor,
    first: int,
    how: Measure,
    variance: str,
    report: Callable[[int], None],
) -> dict[str, np.ndarray]:
    device, schedule = pipe.device, pipe.schedule()
    results: list[dict[str, np.ndarray]] = []

    def work(batch: range) -> None:
        samples = range(first + batch.start, first + batch.stop)
        part = x0[batch.start : batch.stop].to(device)
        result = bound(predict, schedule, part, samples, seed=how.seed, num_steps=how.num_steps, variance=variance)
        arrays = {name: getattr(result, name).numpy() for name in ("nats", "terms", "mse_eps", "mse_x0")}
        if how.num_traces:
            flow = flow_bits_per_dim(predict, schedule, part, samples, seed=how.seed, num_traces=how.num_traces)
            arrays["flow"] = flow.cpu().numpy()
        results.append(arrays)
        report(samples.stop * how.passes(schedule.num_steps))

    in_batches(len(x0), first_batch(how.batch_size, device, x0[0, 0].numel()), work)
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def _read_part(path: Path, known: str, count: int) -> dict[str, np.ndarray] | None:
    """A part that an earlier run of the same measurement wrote; None: there is none that is whole."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["known"]) != known or len(arrays["nats"]) != count:
                return None
            return {name: arrays[name] for name in ARRAYS if name in arrays}
    except (*UNREADABLE, KeyError):
        return None


def _write(pipe: GuidedDDPMPipeline, whole: dict[str, np.ndarray], how: Measure, out: Path) -> dict:
    """The tables; returns the totals."""
    shape = pipe.image_shape()
    unit = math.prod(shape) * math.log(2)
    bits = whole["nats"] / unit
    rows = [_row(t, whole, unit) for t in range(pipe.schedule().num_steps + 1)]
    write_csv(out / "likelihood.csv", rows, list(rows[0]))
    columns = {"bits_per_dim": bits} | ({"flow_bits_per_dim": whole["flow"]} if "flow" in whole else {})
    images = [{"image": i} | {name: float(column[i]) for name, column in columns.items()} for i in range(len(bits))]
    write_csv(out / "images.csv", images, list(images[0]))
    totals = {name: list(_mean(column)) for name, column in columns.items()}
    record = totals | {
        "num_images": len(bits),
        "num_steps": how.num_steps,
        "num_traces": how.num_traces,
        "seed": how.seed,
        "dims": math.prod(shape),
        "precision": str(how.precision).removeprefix("torch."),
        "device": device_name(pipe.device),
        "versions": versions(),
    }
    atomic_write_text(out / "likelihood.json", json.dumps(record, indent=1) + "\n")
    return record


def _row(t: int, whole: dict[str, np.ndarray], unit: float) -> dict[str, float]:
    """Column t of the terms, L_t: mean and standard error in bits per dimension; and the errors at t."""
    term, error = _mean(whole["terms"][:, t] / unit)
    drawn = int(np.isfinite(whole["terms"][:, t]).sum())
    row = {"t": t, "bits_per_dim": term, "bits_per_dim_se": error, "num_images": drawn}
    return row | {name: _mean(whole[name][:, t])[0] for name in ("mse_eps", "mse_x0")}


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, without what is not a number; nan where there is too little."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
