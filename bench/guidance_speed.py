"""Guided sampling against a plain implementation, on one machine in one run: images per second and peak memory.

The plain version works as published implementations do by their description: all parameters trainable, float32,
contiguous format, noise from one CPU generator, the full gradient at each step, everything eager. Both use the same
U-Net (the paper's, 64 x 64, random weights: speed does not depend on them) and the same classifier. Each measurement
runs in a process of its own, so that peaks of memory are its own; variants alternate, and ratios are taken in pairs.

    python bench/guidance_speed.py --batch-size 16 --steps 4 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

VARIANTS = (
    *("plain", "full", "checkpoint", "no_jacobian", "every_4"),
    *("compiled", "half_weights", "compiled_half_weights", "graphs_half_weights"),
)
PUBLISHED = {
    "block_out_channels": [64, 128, 192, 256],
    "attention": [False, True, True, True],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "dropout": 0.0,
}
TOY = {"block_out_channels": [8, 16], "attention": [False, True], "attention_head_dim": 4, "norm_num_groups": 4}
TOY |= {"layers_per_block": 1}


def models(size: int, toy: bool = False):
    """The paper's U-Net, or a tiny one, and classifier with random weights."""
    import torch

    from nrcg.classifiers.architectures import build_module
    from nrcg.config import UNetConfig
    from nrcg.diffusion.unet import build_unet

    torch.manual_seed(0)
    return build_unet(UNetConfig(**PUBLISHED | (TOY if toy else {})), size, 3), build_module(
        "mobilenet_v3_small", 3, 0.1
    ).eval()


def plain_steps(unet, classifier, batch_size: int, size: int, steps: int, device) -> float:
    """Seconds of some guided steps of the plain version (eq. 1 with eq. 5 and EMA 0.99)."""
    import torch

    from nrcg.diffusion.schedule import Schedule

    unet, classifier = unet.to(device), classifier.to(device)
    schedule = Schedule.linear(400, 1e-4, 0.02)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch_size, 3, size, size), generator=generator).to(device)
    mean = torch.zeros_like(x)
    began = None
    for step in range(steps + 1):  # the first is the warm-up
        if step == 1:
            began = _now(device)
        t = 400 - step
        x = x.detach().requires_grad_(True)
        eps = unet(x, t - 1).sample
        x0 = schedule.pred_x0(x, eps, t).clamp(-1, 1)
        log_prob = torch.log_softmax(classifier(x0), dim=1)[:, 0].sum()
        grad = torch.autograd.grad(log_prob, x)[0]
        mean = 0.99 * mean + 0.01 * grad
        a, b, variance = schedule.posterior(t)
        noise = torch.randn(x.shape, generator=generator).to(device)
        x = a * x0 + b * x + 10.0 * variance * mean + variance**0.5 * noise
    return _now(device) - began


def our_steps(unet, classifier, variant: str, batch_size: int, size: int, steps: int, device, precision) -> float:
    """Seconds of the same number of steps by the package."""
    import torch

    from nrcg import EMA, Classifier, ClassifierGuidance, GuidedDDPMPipeline
    from nrcg.config import ScheduleConfig
    from nrcg.diffusion.unet import build_scheduler
    from nrcg.guidance.sampling import guided_sample, start_samples

    pipe = GuidedDDPMPipeline(
        unet, build_scheduler(ScheduleConfig(num_train_timesteps=400, beta_start=1e-4, beta_end=0.02))
    ).to(device)
    guidance = ClassifierGuidance(
        Classifier(classifier.to(memory_format=torch.channels_last)),
        0,
        10.0,
        stabilizer=EMA(0.99),
        grad_mode=variant if variant in ("checkpoint", "no_jacobian") else "full",
        every_k=4 if variant == "every_4" else 1,
    ).to(device)
    if variant == "checkpoint":
        unet.enable_gradient_checkpointing()
    if "half_weights" in variant:
        pipe.with_weights(precision)
        precision = torch.float32  # instead of autocast
    sampler, predict = pipe.sampler(), pipe.noise_predictor(precision, _compiled(variant))
    samples = range(batch_size)
    x = start_samples(sampler.schedule, 0, samples, (3, size, size), device)

    def run(timesteps):
        guided_sample(x, predict, sampler, timesteps, seed=0, samples=samples, guidance=guidance)

    run([400, 399])
    began = _now(device)
    run([*range(400, 400 - steps, -1)])
    return _now(device) - began


def _compiled(variant: str) -> str:
    how = variant.partition("_")[0]
    return {"compiled": "on", "graphs": "graphs"}.get(how, "off")


def noise_seconds(batch_size: int, size: int, device) -> float:
    """Seconds to draw one step's noise."""
    from nrcg.diffusion.noise import sample_noise

    repeats = 10
    for number in range(repeats + 1):  # the first is the warm-up
        if number == 1:
            began = _now(device)
        sample_noise(0, range(batch_size), number, (3, size, size), device)
    return (_now(device) - began) / repeats


def _now(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(arguments: argparse.Namespace) -> dict:
    """One variant in this process: images per second (for all 400 steps) and peak memory."""
    import torch
    from flops import peak_flops

    from nrcg.devices import resolve_device, resolve_precision

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    unet, classifier = models(arguments.size, arguments.toy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if arguments.variant == "plain":
        seconds = plain_steps(unet, classifier, arguments.batch_size, arguments.size, arguments.steps, device)
    else:
        precision = resolve_precision(arguments.precision, device)
        seconds = our_steps(
            unet,
            classifier,
            arguments.variant,
            arguments.batch_size,
            arguments.size,
            arguments.steps,
            device,
            precision,
        )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        # What sampling needs on top of the models and libraries.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    noise = noise_seconds(arguments.batch_size, arguments.size, device) * arguments.steps / seconds
    found = {
        "images_per_second": arguments.batch_size * arguments.steps / seconds / 400,
        "peak_mib": peak,
        "noise_share": noise,
    }
    if arguments.variant != "plain" and arguments.variant not in ("no_jacobian", "every_4"):
        used = arguments.batch_size * arguments.steps / seconds * step_flops(arguments.size, arguments.toy)
        found |= {"tflops": used / 1e12, "share_of_peak": used / peak_flops(device, precision)}
    return found


def step_flops(size: int, toy: bool) -> int:
    """Operations of one image in one guided step: the U-Net, the classifier, and the gradient through both."""
    import torch
    from flops import count_flops

    unet, classifier = (module.requires_grad_(False) for module in models(size, toy))
    x = torch.zeros(1, 3, size, size, requires_grad=True)
    return count_flops(lambda: torch.log_softmax(classifier(unet(x, 1).sample), dim=1)[:, 0].sum().backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="guided steps timed; a multiple of 4 for every_4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int)
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
        name: getattr(arguments, name.replace("-", "_"))
        for name in ("batch-size", "size", "steps", "device", "precision", "threads", "toy")
    }
    found = measure_in_turn(__file__, arguments.variants, arguments.repeats, flags)
    print("| variant | images/s (median) | times plain (min to max) | peak MiB | share of plain | noise's share |")
    print("|---|---|---|---|---|---|")
    summary = {}
    for variant, runs in found.items():
        speeds = [run["images_per_second"] for run in runs]
        pairs = zip(runs, found["plain"], strict=True)
        ratios = [run["images_per_second"] / plain["images_per_second"] for run, plain in pairs]
        peak = statistics.median(run["peak_mib"] for run in runs)
        share = peak / statistics.median(run["peak_mib"] for run in found["plain"])
        print(
            f"| {variant} | {statistics.median(speeds):.4f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {peak:.0f} | {share:.2f} |"
            f" {100 * max(run['noise_share'] for run in runs):.2f} % |"
        )
        summary[variant] = {"images_per_second": statistics.median(speeds), "times_plain": statistics.median(ratios)}
        summary[variant] |= {"min": min(ratios), "max": max(ratios), "peak_mib": peak}
        if "share_of_peak" in runs[0]:
            summary[variant]["share_of_peak"] = statistics.median(run["share_of_peak"] for run in runs)
    if "full" in summary:
        used = 100 * summary["full"]["share_of_peak"]
        print(f"\nThe full gradient uses {used:.1f} % of what a large matrix product reaches on this device.")
    write_json(arguments.json, summary, found)


if __name__ == "__main__":
    main()
