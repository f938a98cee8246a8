"""What one image costs on this device: a step of sampling and one of training, measured for `nrcg plan`.

Random weights take as long as trained ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch.nn import functional as F

from nrcg.batching import first_batch, is_out_of_memory
from nrcg.classifiers.adapter import Classifier
from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.specs import load_classifier
from nrcg.config import ROLES, ExperimentConfig
from nrcg.diffusion.compiling import compile_in_place
from nrcg.diffusion.schedule import Schedule
from nrcg.diffusion.unet import build_scheduler, build_unet
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.pipeline.plan import CHANNELS
from nrcg.training.ddpm import ddpm_loss
from nrcg.training.trainer import Trainer


def count_parameters(settings: ExperimentConfig, unet: UNet2DModel | None) -> dict[str, int]:
    """`unet`, where it is known, and the architectures of classifiers that are trained -> number of parameters."""
    found = {} if unet is None else {"unet": unet.num_parameters()}
    for classifier in (getattr(settings.classifiers, role) for role in ROLES):
        if classifier.pretrained is classifier.init is None:
            with torch.device("meta"):
                module = build_module(classifier.architecture, len(settings.dataset.classes), 0.1)
            found[classifier.architecture] = sum(parameter.numel() for parameter in module.parameters())
    return found


def meta_unet(settings: ExperimentConfig, folder: Path) -> UNet2DModel | None:
    """The U-Net that is trained, or that of `pretrained` or `init` as its folder says, without memory for its weights.

    Args:
        settings: The experiment's.
        folder: models/<experiment>/ddpm, looked at first where the network is somebody's.

    Returns:
        None where that model is not at hand.
    """
    source = settings.ddpm.pretrained or settings.ddpm.init
    with torch.device("meta"):
        if source is None:
            return build_unet(settings.ddpm.unet, settings.dataset.image_size, CHANNELS)
        for place in (folder, Path(source)):
            try:
                return UNet2DModel.from_config(json.loads((place / "unet" / "config.json").read_text()))
            except (OSError, ValueError, TypeError):
                continue
    return None


def seconds_per_image(
    work: Callable[[int], object], most: int, *, device: torch.device, budget: float = 1.0, compiled: bool = False
) -> float:
    """Time of work(n), which does n images at once, for each image; the lowest in about `budget` seconds.

    Wall time on a GPU; processor time on the CPU, which what else the machine does disturbs less. Begins with one
    image and doubles their number, up to `most` or what the memory holds; what is compiled for a number of images is
    measured with `most` alone, after a call that compiles it.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(size: int) -> float:
        began = clock()
        work(size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - began) / size

    if compiled:
        work(most)
    least = most if compiled else 1
    best, size, began = timed(least), least, clock()
    if best > 5 * budget:  # however cold it was
        return best
    while clock() - began < budget:
        try:
            best = min(best, timed(size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return best
        size = min(2 * size, most)
    return best


def measure(
    settings: ExperimentConfig,
    counted: Collection[str],
    *,
    unet: UNet2DModel | None,
    device: torch.device,
    precision: torch.dtype,
    budget: float = 1.0,
) -> tuple[dict[str, float], list[str]]:
    """Seconds per image of what `nrcg.pipeline.plan` counts; on the CPU, of one core.

    Args:
        settings: The experiment's.
        counted: Names; those that cannot be measured here are left out of the result.
        unet: As `meta_unet` gives it; None: nothing that passes through it is measured.
        precision: Autocast of the U-Net.
        budget: Seconds for each measurement, about.

    Returns:
        Name -> seconds, and notes on how they came about.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the workflow's jobs share the cores
    try:
        costs: dict[str, float] = {}
        for architecture in sorted({name.partition(" ")[2] for name in counted if " " in name}):
            seconds = _classifier_step(settings, architecture, device, budget / 2)
            costs |= {f"train {architecture}": seconds, f"classify {architecture}": seconds / 3}
        if unet is None:
            return costs, ["U-Net: the pretrained model is not at hand, so that its passes cannot be measured"]
        return costs | _unet_costs(settings, unet.to_empty(device=device), device, precision, budget), []
    finally:
        torch.set_num_threads(threads)


def _unet_costs(
    settings: ExperimentConfig, unet: UNet2DModel, device: torch.device, precision: torch.dtype, budget: float
) -> dict[str, float]:
    """A step without guidance, one guided through x0hat, and one of training."""
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    size, schedule = settings.dataset.image_size, Schedule.from_config(settings.ddpm.schedule)
    pipe = GuidedDDPMPipeline(unet, build_scheduler(settings.ddpm.schedule))
    shard = min(settings.sampling.shard_size, settings.sampling.num_samples)
    compiled = pipe.resolve_compile(settings.compile, 3 * shard * schedule.num_steps)  # as a guided job decides
    predict = pipe.with_weights(settings.unet_weights).noise_predictor(precision, compiled)
    role = settings.classifiers.non_robust
    guidance = ClassifierGuidance(_classifier(settings, role.network).to(device), 0)

    def images(n: int) -> torch.Tensor:
        return torch.zeros(n, CHANNELS, size, size, device=device)

    @torch.no_grad()
    def forward(n: int) -> None:
        predict(images(n), schedule.num_steps)

    def guided(n: int) -> None:
        guidance.reset()
        guidance(images(n), schedule.num_steps, predict, schedule)

    most = first_batch(settings.sampling.batch_size, device, size**2)
    one, both = (
        seconds_per_image(work, most, device=device, budget=budget, compiled=compiled != "off")
        for work in (forward, guided)
    )
    if compiled != "off":
        compile_in_place(unet)
    trainer = Trainer(unet.float().train().requires_grad_(True), settings.ddpm.optimizer, 1000, device, precision)

    def step(n: int) -> None:
        t = torch.ones(n, dtype=torch.long, device=device)
        trainer.backward(ddpm_loss(unet, schedule, images(n), t, torch.randn_like(images(n)), precision))
        trainer.update()

    most = settings.ddpm.micro_batch_size or settings.ddpm.batch_size
    training = seconds_per_image(step, most, device=device, budget=budget, compiled=compiled != "off")
    return {"unet_forward": one, "unet_gradient": both, "unet_checkpoint": both + one, "unet_train": training}


def _classifier_step(settings: ExperimentConfig, architecture: str, device: torch.device, budget: float) -> float:
    """Seconds of a training step of a classifier for each image; a forward pass takes about a third of them."""
    classifier = _classifier(settings, architecture).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-6)
    size = settings.dataset.image_size

    def step(n: int) -> None:
        n = max(n, 2)  # batch norm learns nothing from one image
        logits = classifier(torch.randn(n, CHANNELS, size, size, device=device))
        F.cross_entropy(logits.float(), torch.zeros(n, dtype=torch.long, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return seconds_per_image(step, 128, device=device, budget=budget)


def _classifier(settings: ExperimentConfig, architecture: str) -> Classifier:
    """A classifier of an architecture, untrained, or of the SPEC that is taken or trained on."""
    roles = [getattr(settings.classifiers, role) for role in ROLES]
    if any(architecture in (role.pretrained, role.init) for role in roles):
        return load_classifier(architecture)
    return Classifier(build_module(architecture, len(settings.dataset.classes), 0.1))
