"""What one image costs on this device: a short measurement with the experiment's own networks, for `nrcg plan`.

Random weights take as long as trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrcg.batching import MOST_ON_CPU, is_out_of_memory, largest_batch
from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.specs import load_classifier
from nrcg.config import ROLES, ExperimentConfig, UNetConfig
from nrcg.data import sportballs
from nrcg.devices import autocast, freeze
from nrcg.diffusion.unet import build_unet
from nrcg.evaluation.features import load_extractor
from nrcg.guidance.guidance import log_prob_gradient
from nrcg.pipeline.plan import CHANNELS

SLOW_SECONDS = 4.0
"""A U-Net whose forward pass of one image takes longer is not measured further."""
SLOW_RATIOS = {"unet_gradient": 3.0, "unet_checkpoint": 4.0, "unet_train": 4.0}
"""What is taken for it instead, in forward passes: a backward pass costs about two, the weights' gradients one more."""


def seconds_per_image(
    work: Callable[[int], object], batch_size: int, *, device: torch.device, budget: float = 1.0
) -> float:
    """Time of work(n), which does n images at once, for each image.

    Wall time on a GPU; processor time on the CPU, which what else the machine does disturbs less. Warmed up with one
    image, then measured in batches of batch_size or of as many as take about `budget` seconds; the lowest time counts.
    One image that alone takes several times the budget is not done twice.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(size: int) -> float:
        began = clock()
        work(size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    cold = timed(1)
    if cold > 5 * budget:
        return cold
    size, best, began = 1, timed(1), clock()
    while size < batch_size:  # a larger batch costs less per image, so that again more may fit
        larger = min(batch_size, int(budget / best))
        if larger < 1.5 * size and larger < batch_size:
            break
        try:
            size, best = larger, timed(larger) / larger
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return best
    while True:
        best = min(best, timed(size) / size)
        if clock() - began > budget:
            return best


def measure(
    settings: ExperimentConfig,
    operations: Collection[str],
    *,
    unet: UNetConfig | None,
    device: torch.device,
    precision: torch.dtype,
    classifier_precision: torch.dtype,
    budget: float = 1.0,
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
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the workflow's jobs share the cores
    try:
        if unet is None:
            costs: dict[str, float] = {}
            notes = ["U-Net: the pretrained model is not at hand, so that its passes cannot be measured"]
        else:
            costs, notes = _unet_costs(settings, unet, operations, device, precision, budget)
        for operation in operations:
            kind, _, architecture = operation.partition(" ")
            if kind == "features":
                work = _features(settings, architecture, device)
                costs[operation] = seconds_per_image(work, 64, device=device, budget=budget)
            elif architecture:
                costs[operation] = _classifier_cost(
                    settings, kind, architecture, device, classifier_precision, budget=budget / 2
                )
            elif kind == "draw":
                costs[operation] = seconds_per_image(_drawing(settings), 256, device=torch.device("cpu"), budget=budget)
    finally:
        torch.set_num_threads(threads)
    return costs, notes


def _sampling_batch(settings: ExperimentConfig, trial: Callable[[int], object], device: torch.device) -> int:
    """Samples at once, as sampling chooses them."""
    most = min(settings.sampling.shard_size, settings.sampling.num_samples)
    if settings.sampling.batch_size != "auto":
        return min(settings.sampling.batch_size, most)
    # On a CPU the search would cost more than the measurement.
    return largest_batch(trial, most, device) if device.type == "cuda" else min(MOST_ON_CPU, most)


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

    guided = bool({"unet_gradient", "unet_checkpoint"} & set(operations))
    batch_size = _sampling_batch(settings, gradient if guided else forward, device)
    costs = {"unet_forward": seconds_per_image(forward, batch_size, device=device, budget=budget)}
    if costs["unet_forward"] > SLOW_SECONDS:
        costs |= {name: ratio * costs["unet_forward"] for name, ratio in SLOW_RATIOS.items()}
        seconds = f"{costs['unet_forward']:.0f} s"
        return costs, [f"U-Net: one forward pass takes {seconds}; gradients and training are taken for 3 and 4 of them"]
    if guided:
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

        costs["unet_train"] = seconds_per_image(step, settings.ddpm.batch_size, device=device, budget=2 * budget)
    return costs, []


def _classifier_cost(
    settings: ExperimentConfig,
    kind: str,
    architecture: str,
    device: torch.device,
    precision: torch.dtype,
    *,
    budget: float,
) -> float:
    """Of `train`, `classify` or `gradient`."""
    size = settings.dataset.image_size
    if any(getattr(settings.classifiers, role).pretrained == architecture for role in ROLES):
        classifier = load_classifier(architecture).to(device)
    else:
        classifier = Classifier(build_module(architecture, len(settings.dataset.classes), 0.1)).to(device)
    batch_size = 256  # as accuracies are taken
    if kind == "train":
        roles = (getattr(settings.classifiers, role) for role in ROLES)
        batch_size = next(role.batch_size for role in roles if role.architecture == architecture)
        work = _classifier_step(classifier, size, device, precision)
    elif kind == "gradient":
        batch_size = MOST_ON_CPU if device.type == "cpu" else batch_size
        work = _classifier_pass(classifier, size, device, gradient=True)
    else:
        work = _classifier_pass(classifier, size, device, gradient=False)
    return seconds_per_image(work, batch_size, device=device, budget=budget)


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


def _features(settings: ExperimentConfig, name: str, device: torch.device) -> Callable[[int], object]:
    size = settings.dataset.image_size
    extractor = load_extractor(name, weights_dir=settings.evaluation.inception_dir, device=device)
    return lambda n: extractor(np.zeros((n, size, size, CHANNELS), np.uint8))
