"""Training of the diffusion model against a plain loop, on one device in one run: images per second and peak memory.

The plain loop is written as published ones are by their description: a DataLoader that turns each uint8 picture into a
normalised float tensor on the CPU, float32 parameters in contiguous format, everything eager, float16 autocast with a
GradScaler (float32 without a GPU), AdamW, gradient clipping, a cosine schedule, an exponential moving average of the
weights, the loss read at each step for the progress bar. `plain` reads in its own process, as DataLoader does unless
told otherwise; `plain_workers` has four processes for it. Ours is `nrcg.training.ddpm.train_ddpm` as `nrcg train-ddpm`
calls it. All use the same U-Net (the paper's), the same SportBalls and the same batch. Each measurement runs in a
process of its own; variants alternate, ratios are taken in pairs.

    python bench/training_speed.py --repeats 3 --json training_speed.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "plain_workers", "ours", "compiled")
TOY_UNET = {
    "block_out_channels": [8, 16],
    "attention": [False, True],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
WARM_UP = 5
"""Steps before the clock starts."""
BATCHES = 20
"""Different batches in an epoch."""


def ddpm_config(batch_size: int, toy: bool):
    """The published settings, from config.yaml, without the pauses of a real training."""
    from nrcg.config import load

    config = load(ROOT / "config.yaml").experiments["sportballs"].ddpm
    pauses = {"checkpoint_minutes": 1e6, "num_val_images": 1, "sample_every": 0}
    unet = config.unet.model_copy(update=TOY_UNET if toy else {})
    return config.model_copy(update={"batch_size": batch_size, "epochs": 1_000_000, "unet": unet} | pauses)


def draw_images(size: int, count: int):
    """SportBalls (count, size, size, 3) uint8."""
    import numpy as np

    from nrcg.data import sportballs

    setting = {"classes": ["baseball", "basketball", "soccer"], "diameter": (0.3, 0.7)}
    return sportballs.render(0, np.arange(count), image_size=size, **setting)[0]


def plain_loop(config, images, device, precision, workers: int, seconds: float) -> tuple[int, float]:
    """Steps done and the seconds they took, of the plain loop."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel
    from flops import now
    from PIL import Image
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from nrcg.diffusion.unet import build_unet

    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    class Pictures(Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int):
            return to_tensor(Image.fromarray(images[index]))

    loader = DataLoader(
        Pictures(), config.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    schedule = config.schedule
    scheduler = DDPMScheduler(schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end)
    unet = build_unet(config.unet, images.shape[1], images.shape[3]).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.optimizer.learning_rate)
    rate = get_cosine_schedule_with_warmup(optimizer, config.optimizer.warmup_steps, 100_000)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay)
    step, began = 0, now(device)
    while True:
        for x0 in loader:
            x0 = x0.to(device)
            noise = torch.randn_like(x0)
            t = torch.randint(0, schedule.num_train_timesteps, (len(x0),), device=device)
            x_t = scheduler.add_noise(x0, noise, t)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = F.mse_loss(unet(x_t, t).sample, noise)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.optimizer.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            rate.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.item()  # for the progress bar
            step += 1
            if step == WARM_UP:
                began = now(device)
            elif step > WARM_UP and now(device) - began >= seconds:
                return step - WARM_UP, now(device) - began


class _Enough(Exception):
    """The clock has run out."""


def our_loop(config, images, device, precision, seconds: float, compiled: bool = False) -> tuple[int, float]:
    """The same of the package's training."""
    import numpy as np
    from flops import now

    from nrcg.training import ddpm, feed, trainer

    pictures = feed.TrainingImages(images, np.zeros(len(images), np.int64), device)
    began, result, looked = 0.0, (0, 0.0), WARM_UP

    def on_step(step: int) -> None:
        nonlocal began, result, looked
        if step == WARM_UP:
            began = now(device)
        elif step >= 2 * looked or (step > WARM_UP and device.type == "cpu"):
            # Rarely: to look at the clock is to wait for the device, which the training itself does not do.
            looked = step
            result = (step - WARM_UP, now(device) - began)
            if result[1] >= seconds:
                raise _Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        ddpm.train_unet(
            config,
            pictures,
            pictures,
            image_size=images.shape[1],
            channels=images.shape[3],
            device=device,
            precision=precision,
            checkpoint=trainer.Checkpoint(Path(folder) / "checkpoint.pt", "", config.checkpoint_minutes),
            hooks=ddpm.Hooks(on_step),
            compile="on" if compiled else "off",
        )
    return result


def step_flops(config, size: int) -> int:
    """Operations of one image in one training step, forward and backward."""
    import torch
    from flops import count_flops

    from nrcg.diffusion.unet import build_unet

    unet, x = build_unet(config.unet, size, 3), torch.zeros(1, 3, size, size)
    return count_flops(lambda: unet(x, torch.tensor([1])).sample.sum().backward())


def measure(arguments: argparse.Namespace) -> dict:
    """One variant in this process."""
    import resource

    import numpy as np
    import torch
    from flops import peak_flops

    from nrcg.devices import resolve_device, resolve_precision

    device = resolve_device(arguments.device)
    config = ddpm_config(arguments.batch_size, arguments.toy)
    images = draw_images(arguments.size, BATCHES * arguments.batch_size)
    if arguments.variant in ("ours", "compiled"):
        precision = resolve_precision("auto", device, training=True)
        if device.type == "cuda":  # an epoch's end costs ours a validation: nearly as rare as with 80,000 images
            images = np.tile(images, (8, 1, 1, 1))
        steps, seconds = our_loop(config, images, device, precision, arguments.seconds, arguments.variant == "compiled")
    else:
        precision = torch.float16 if device.type == "cuda" else torch.float32
        workers = 4 if arguments.variant == "plain_workers" else 0
        steps, seconds = plain_loop(config, images, device, precision, workers, arguments.seconds)
    speed = steps * arguments.batch_size / seconds
    peak = (
        torch.cuda.max_memory_allocated(device) / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    found = {"images_per_second": speed, "steps": steps, "peak_mib": peak, "precision": str(precision)[6:]}
    if arguments.variant in ("ours", "compiled"):
        used = speed * step_flops(config, arguments.size)
        found |= {"tflops": used / 1e12, "share_of_peak": used / peak_flops(device, precision)}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--toy", action="store_true", help="a tiny U-Net, to try the benchmark itself")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one alone and print JSON")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    from variants import measure_in_turn, write_json

    flags = {
        name: getattr(arguments, name.replace("-", "_")) for name in ("batch-size", "size", "seconds", "device", "toy")
    }
    found = measure_in_turn(__file__, arguments.variants, arguments.repeats, flags)
    table, summary = summarize(found)
    print(table)
    write_json(arguments.json, summary, found)


def summarize(found: dict[str, list[dict]]) -> tuple[str, dict]:
    """A Markdown table, and for each variant the median speed and its ratios to `plain`, pair by pair."""
    lines = [
        "| variant | images/s (median) | times plain (min to max) | peak MiB | precision |",
        "|---|---|---|---|---|",
    ]
    summary = {}
    for variant, runs in found.items():
        pairs = zip(runs, found.get("plain", []), strict=False)
        ratios = [run["images_per_second"] / plain["images_per_second"] for run, plain in pairs]
        row = {"images_per_second": statistics.median(run["images_per_second"] for run in runs)}
        if ratios:
            row |= {"times_plain": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        if "share_of_peak" in runs[0]:
            row["share_of_peak"] = statistics.median(run["share_of_peak"] for run in runs)
        summary[variant] = row
        against = f"{row['times_plain']:.2f} ({row['min']:.2f} to {row['max']:.2f})" if ratios else "-"
        peak = statistics.median(run["peak_mib"] for run in runs)
        lines.append(
            f"| {variant} | {row['images_per_second']:.1f} | {against} | {peak:.0f} | {runs[0]['precision']} |"
        )
    if share := summary.get("ours", {}).get("share_of_peak"):
        lines.append(f"\nOurs uses {100 * share:.1f} % of what a large matrix product reaches on this device.")
    return "\n".join(lines), summary


if __name__ == "__main__":
    main()
