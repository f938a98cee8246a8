"""What one image costs on this device: a short measurement with the experiment's own networks, for `nrcg plan`.

Random weights take as long as trained ones.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg import sportballs
from nrcg.batching import MOST_ON_CPU, is_out_of_memory, largest_batch
from nrcg.classifiers import Classifier, build_module
from nrcg.config import BatchSize, ExperimentConfig, UNetConfig
from nrcg.diffusion import autocast, build_unet, freeze
from nrcg.features import InceptionExtractor
from nrcg.guidance import log_prob_gradient
from nrcg.plan import CHANNELS

SLOW_SECONDS = 4.0
"""A U-Net whose forward pass of one image takes longer is not measured further."""
SLOW_RATIOS = {"unet_gradient": 3.0, "unet_checkpoint": 4.0, "unet_train": 4.0}
"""What is taken for it instead, in forward passes: a backward pass costs about two, the weights' gradients one more."""


def processors() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_per_image(
    work: Callable[[int], object], batch_size: int, *, device: torch.device, budget: float = 1.5
) -> float:
    """Time of work(n), which does n images at once, for each image.

    Warmed up with one image; then in batches of batch_size, or of as many as `budget` seconds allow. The fastest of
    several counts: what else the machine does only ever adds.

    Returns:
        Seconds per image, also where one image alone takes longer than the budget.
    """
    began = time.perf_counter()
    cold = _timed(work, 1, device)
    if cold > budget:
        return cold
    one = _timed(work, 1, device)
    size = max(1, min(batch_size, int(budget / 4 / one)))
    best = one
    if size > 1:
        try:
            _timed(work, size, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return one
    while True:
        best = min(best if size == 1 else np.inf, _timed(work, size, device) / size)
        if time.perf_counter() - began > budget:
            return float(best)


def _timed(work: Callable[[int], object], size: int, device: torch.device) -> float:
    began = time.perf_counter()
    work(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(
    settings: ExperimentConfig,
    operations: Collection[str],
    *,
    unet: UNetConfig | None,
    device: torch.device,
    precision: torch.dtype,
    classifier_precision: torch.dtype,
    budget: float = 1.5,
) -> tuple[dict[str, float], list[str]]:
    """Seconds per image of some operations of `nrcg.plan`; on the CPU, of one core.

    Args:
        operations: names; those that cannot be measured here are left out of the result.
        unet: None: not known, nothing that passes through it is measured.
        precision: autocast of the U-Net.
        classifier_precision: autocast of the classifiers' training.
        budget: seconds for each operation, about.

    Returns:
        operation -> seconds, and notes on how they came about.
    """
    costs: dict[str, float] = {}
    notes: list[str] = []
    with _threads(1, device):
        if unet is not None:
            found, notes = _unet_costs(settings, unet, operations, device, precision, budget)
            costs |= found
        else:
            notes = ["U-Net: the pretrained model is not at hand, so that its passes cannot be measured"]
        size = settings.dataset.image_size
        for operation in operations:
            kind, _, architecture = operation.partition(" ")
            if kind in ("train", "classify", "gradient"):
                role = next(
                    config
                    for config in (
                        getattr(settings.classifiers, name) for name in type(settings.classifiers).model_fields
                    )
                    if config.architecture == architecture
                )
                classifier = Classifier(build_module(architecture, len(settings.dataset.classes), 0.1)).to(device)
                if kind == "train":
                    work = _classifier_step(classifier, size, device, classifier_precision)
                    batch_size = role.batch_size
                else:
                    work = _classifier_pass(classifier, size, device, gradient=kind == "gradient")
                    batch_size = 256 if kind == "classify" else _batch(settings.sampling.batch_size, settings, device)
                costs[operation] = seconds_per_image(work, batch_size, device=device, budget=budget / 2)
            elif kind == "draw" and settings.dataset.source == "sportballs":
                costs[operation] = seconds_per_image(_drawing(settings), 256, device=torch.device("cpu"), budget=budget)
            elif kind == "inception":
                extractor = InceptionExtractor(settings.evaluation.inception_dir, str(device))
                pixels = np.zeros((64, size, size, CHANNELS), np.uint8)
                costs[operation] = seconds_per_image(
                    lambda n, extractor=extractor, pixels=pixels: extractor(pixels[:n]),
                    64,
                    device=device,
                    budget=budget,
                )
    return costs, notes


@contextlib.contextmanager
def _threads(count: int, device: torch.device) -> Iterator[None]:
    """So many CPU threads, where the CPU computes: the workflow's jobs share the cores, one each."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch(batch_size: BatchSize, settings: ExperimentConfig, device: torch.device) -> int:
    if batch_size == "auto":
        batch_size = MOST_ON_CPU
    return min(batch_size, settings.sampling.shard_size, settings.sampling.num_samples)


def _unet_costs(
    settings: ExperimentConfig,
    config: UNetConfig,
    operations: Collection[str],
    device: torch.device,
    precision: torch.dtype,
    budget: float,
) -> tuple[dict[str, float], list[str]]:
    size = settings.dataset.image_size
    unet = freeze(build_unet(config, size, CHANNELS).to(device))

    def images(n: int) -> Tensor:
        return torch.zeros(n, CHANNELS, size, size, device=device)

    def forward(n: int) -> None:
        with torch.no_grad(), autocast(device, precision):
            unet(images(n), torch.zeros(n, device=device))

    def gradient(n: int) -> None:
        x = images(n).requires_grad_(True)
        with autocast(device, precision):
            eps = unet(x, torch.zeros(n, device=device)).sample
        torch.autograd.grad(eps.float().sum(), x)

    trial = gradient if "unet_gradient" in operations else forward
    if settings.sampling.batch_size == "auto" and device.type == "cuda":
        batch_size = largest_batch(trial, min(settings.sampling.shard_size, settings.sampling.num_samples), device)
    else:
        batch_size = _batch(settings.sampling.batch_size, settings, device)
    costs = {"unet_forward": seconds_per_image(forward, batch_size, device=device, budget=budget)}
    if costs["unet_forward"] > SLOW_SECONDS:
        costs |= {name: ratio * costs["unet_forward"] for name, ratio in SLOW_RATIOS.items()}
        seconds = f"{costs['unet_forward']:.0f} s"
        return costs, [f"U-Net: one forward pass takes {seconds}; gradients and training are taken for 3 and 4 of them"]
    if {"unet_gradient", "unet_checkpoint"} & set(operations):
        costs["unet_gradient"] = seconds_per_image(gradient, batch_size, device=device, budget=budget)
        costs["unet_checkpoint"] = costs["unet_gradient"] + costs["unet_forward"]
    if "unet_train" in operations:
        unet.train().requires_grad_(True)
        update = _updates(unet)

        def step(n: int) -> None:
            noise = torch.randn_like(images(n))
            with autocast(device, precision):
                eps = unet(noise, torch.zeros(n, device=device)).sample
            update(F.mse_loss(eps.float(), noise))

        # One job with all cores.
        cores = min(16, processors()) if device.type == "cpu" else 1
        with _threads(cores, device):
            found = seconds_per_image(step, settings.ddpm.batch_size, device=device, budget=2 * budget)
        costs["unet_train"] = found * cores
    return costs, []


def _updates(module: nn.Module) -> Callable[[Tensor], None]:
    """What a training step does with its loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)

    def update(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _classifier_step(
    classifier: nn.Module, size: int, device: torch.device, precision: torch.dtype
) -> Callable[[int], None]:
    update = _updates(classifier.train())

    def step(n: int) -> None:
        n = max(n, 2)  # batch norm learns nothing from one image
        with autocast(device, precision):
            logits = classifier(torch.randn(n, CHANNELS, size, size, device=device))
        update(F.cross_entropy(logits.float(), torch.zeros(n, dtype=torch.long, device=device)))

    return step


def _classifier_pass(
    classifier: nn.Module, size: int, device: torch.device, *, gradient: bool
) -> Callable[[int], None]:
    freeze(classifier)

    def work(n: int) -> None:
        x = torch.zeros(n, CHANNELS, size, size, device=device)
        if gradient:
            log_prob_gradient(classifier, 0, x)
        else:
            with torch.no_grad():
                classifier(x)

    return work


def _drawing(settings: ExperimentConfig) -> Callable[[int], object]:
    data = settings.dataset
    return lambda n: sportballs.render(
        data.seed, np.arange(n), image_size=data.image_size, classes=data.classes, diameter=tuple(data.diameter)
    )
