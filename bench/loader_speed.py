"""Share of a training step that is spent waiting for its batch, for a data set that does not stay on the device.

Each step is a real forward and backward pass of a U-Net. `plain` reads a batch when it is wanted, `ahead` is what the
training does: threads read the next batches from the memory map. `resident` (GPUs) keeps all images on the device. The
file is dropped from the system's page cache before each measurement, so that reads reach the disk; variants take turns.

    python bench/loader_speed.py                                              # the paper's U-Net and batch
    python bench/loader_speed.py --channels 8 16 --batch-size 16 --steps 20   # a CPU's size
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nrcg.config import UNetConfig
from nrcg.devices import autocast, resolve_device, resolve_precision
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_unet
from nrcg.training.feed import TrainingImages, batches_from


def write_images(path: Path, count: int, size: int) -> None:
    """Random pixels: (count, size, size, 3) uint8."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, size, size, 3))
    rng = np.random.default_rng(0)
    for first in range(0, count, 1000):
        rows = array[first : first + 1000]
        rows[:] = rng.integers(0, 256, rows.shape, dtype=np.uint8)
    array.flush()


def forget(path: Path) -> None:
    """Drop a file from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def feed(images: TrainingImages, variant: str, order: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return (images.batch(indices) for indices in order) if variant == "plain" else images.batches(order)


def measure(path: Path, variant: str, arguments: argparse.Namespace, device: torch.device, unet) -> dict[str, float]:
    """Milliseconds per step: waiting and computing, and the share of the waiting. The first steps are the warm-up."""
    forget(path)
    array = np.load(path, mmap_mode="r")
    resident = float("inf") if variant == "resident" else arguments.limit_mib * 2**20
    if variant != "resident" and array.nbytes <= resident:
        raise SystemExit(f"--images: {array.nbytes / 2**20:.0f} MiB are within --limit-mib; take more images")
    images = TrainingImages(array, np.zeros(len(array), np.int64), device, resident)
    schedule = Schedule.linear(400, 1e-4, 0.02)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    precision = resolve_precision("auto", device)
    order = batches_from(len(array), arguments.batch_size, 0, 0, 10**6)
    batches = feed(images, variant, order)
    waited, computed = [], []
    for step in range(arguments.steps + arguments.warm_up):
        began = now(device)
        x, _ = next(batches)
        ready = now(device)
        t = torch.randint(1, 401, (len(x),), device=device)
        noise = torch.randn_like(x)
        with autocast(device, precision):
            output = unet(schedule.q_sample(x, t, noise), t - 1).sample
        torch.nn.functional.mse_loss(output.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = now(device)
        if step >= arguments.warm_up:
            waited.append(ready - began)
            computed.append(done - ready)
    batches.close()
    return {
        "wait_ms": 1e3 * statistics.mean(waited),
        "compute_ms": 1e3 * statistics.mean(computed),
        "share": sum(waited) / (sum(waited) + sum(computed)),
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-mib", type=float, default=16, help="images that stay on the device at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the images are written; default: the system's temporary folder")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=arguments.channels,
        attention=[False] + [True] * (len(arguments.channels) - 1),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=8,
        dropout=0.0,
    )
    unet = build_unet(config, arguments.size, 3).to(device).train()
    variants = ["plain", "ahead"] + ["resident"] * (device.type == "cuda")
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "images.npy"
        write_images(path, arguments.images, arguments.size)
        for _ in range(arguments.repeats):
            for variant in variants:
                found[variant].append(measure(path, variant, arguments, device, unet))
    for variant, rows in found.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"{variant:9} waits {medians['wait_ms']:8.2f} ms of a step of "
            f"{medians['wait_ms'] + medians['compute_ms']:8.1f} ms: {100 * medians['share']:6.2f} %"
        )
    ratios = [a["wait_ms"] / p["wait_ms"] for a, p in zip(found["ahead"], found["plain"], strict=True)]
    print(f"ahead / plain, waiting: {statistics.median(ratios):.3f} (of {len(ratios)} pairs)")
    print(json.dumps({"device": str(device), "torch": torch.__version__, "arguments": vars(arguments), **found}))


if __name__ == "__main__":
    main()
