"""Likelihood of images under a diffusion model: bits per dimension by the bound, and by the probability flow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nrcg import tracking
from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.config import LikelihoodConfig, LikelihoodStep, fingerprint
from nrcg.data.arrays import open_split, to_unit
from nrcg.devices import device_name
from nrcg.diffusion.likelihood import bound, flow_bits_per_dim, variance_of
from nrcg.errors import DataError
from nrcg.evaluation.sides import Side, in_parts
from nrcg.files import atomic_save_arrays, load_arrays, weights_sha256
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.progress import Progress
from nrcg.provenance import versions
from nrcg.steps.common import checked_data, log_dataset
from nrcg.steps.likelihood_table import ARRAYS, write_tables

BITS_STEPS = 20
"""Terms of the bound per image where it is one number among others."""
PART = 256
"""Images whose numbers are kept at a time: a killed run goes on with the part that it was at."""


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

    @classmethod
    def of(cls, config: LikelihoodConfig, num_images: int, precision: torch.dtype) -> Measure:
        """As an experiment asks for it, of so many images."""
        same = {name: getattr(config, name) for name in ("num_steps", "num_traces", "seed", "batch_size")}
        return cls(num_images=num_images, precision=precision, **same)

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
    per_image = how.passes(pipe.schedule().num_steps)
    found: list[dict[str, np.ndarray]] = []
    with Progress("likelihood", how.num_images * per_image, "step") as bar, torch.inference_mode(False):
        predict = pipe.noise_predictor(how.precision)
        for first, pixels in in_parts(images, how.num_images, PART, pipe.image_shape()):
            path = out / "parts" / f"part{first // PART:05d}.npz"
            part = _read_part(path, known, len(pixels))
            if part is None:
                part = _measure_part(pipe, predict, to_unit(pixels), first, how, variance_of(pipe.scheduler), bar.set)
                atomic_save_arrays(path, part | {"known": np.array(known)})
            found.append(part)
            bar.set((first + len(pixels)) * per_image)
    whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return write_tables(whole, _record(pipe, how), out)


def measure_shard(
    settings: LikelihoodStep,
    *,
    shard: int,
    data: Path,
    ddpm: Path,
    out: Path,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, np.ndarray]:
    """One shard of the validation images' likelihood.

    Args:
        settings: The experiment's settings.
        shard: Number of the shard, from 0. One past the last image has none.
        data: Folder of the data set.
        ddpm: Folder of the diffusion model.
        out: The .npz file of the images' numbers.
        device: Device that computes.
        precision: Autocast of the U-Net.

    Returns:
        What the file holds.
    """
    config, manifest = settings.likelihood, checked_data(data)
    pipe = GuidedDDPMPipeline.from_pretrained(ddpm).to(device)
    images, _ = open_split(data, "val")
    first = min(shard * config.shard_size, len(images))
    stop = min(first + config.shard_size, config.num_images, len(images))
    how = Measure.of(config, stop - first, precision)
    params = settings.model_dump() | {"shard": shard, "weights_sha256": weights_sha256(ddpm)}
    with (
        tracking.run(
            settings.experiment, f"likelihood shard {shard}", kind="shard", params=params, deferred=True
        ) as run,
        Progress("likelihood", how.num_images * how.passes(pipe.schedule().num_steps), "step") as bar,
        torch.inference_mode(False),
    ):
        log_dataset(run, manifest, data, "val", "likelihood")
        predict, x0 = pipe.noise_predictor(precision), to_unit(np.array(images[first:stop]))
        found = _measure_part(pipe, predict, x0, first, how, variance_of(pipe.scheduler), bar.set)
    atomic_save_arrays(out, found | {"record": np.array(json.dumps(_record(pipe, how)))})
    return found


def measure_images(pipe: GuidedDDPMPipeline, x0: torch.Tensor, how: Measure) -> dict[str, np.ndarray]:
    """ARRAYS of images (N, C, H, W) in [-1, 1]; nothing is kept."""
    total = len(x0) * how.passes(pipe.schedule().num_steps)
    with Progress("likelihood", total, "step") as bar, torch.inference_mode(False):
        return _measure_part(
            pipe, pipe.noise_predictor(how.precision), x0, 0, how, variance_of(pipe.scheduler), bar.set
        )


def image_bits(pipe: GuidedDDPMPipeline, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) bits per dimension of (N, H, W, C) uint8 images by BITS_STEPS terms of the bound each."""
    how = Measure(num_images=len(images), num_steps=BITS_STEPS, seed=seed)
    return measure_images(pipe, to_unit(images), how)["nats"] / (math.prod(pipe.image_shape()) * math.log(2))


def _record(pipe: GuidedDDPMPipeline, how: Measure) -> dict[str, Any]:
    """How something was measured."""
    return {
        "num_steps": how.num_steps,
        "num_traces": how.num_traces,
        "seed": how.seed,
        "dims": math.prod(pipe.image_shape()),
        "precision": str(how.precision).removeprefix("torch."),
        "device": device_name(pipe.device),
        "versions": versions(),
    }


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
    if not len(x0):
        width = schedule.num_steps + 1
        empty = {"nats": np.zeros(0)} | {name: np.zeros((0, width)) for name in ("terms", "mse_eps", "mse_x0")}
        return empty | ({"flow": np.zeros(0)} if how.num_traces else {})

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
        arrays = load_arrays(path)
    except DataError:
        return None
    same = str(arrays.get("known")) == known and len(arrays.get("nats", ())) == count
    return {name: arrays[name] for name in ARRAYS if name in arrays} if same else None
