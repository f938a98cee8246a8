"""Training of a small network on points of the plane, by any objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from nrcg.config import DensitiesConfig, ObjectiveConfig
from nrcg.devices import freeze
from nrcg.diffusion.mlp import PointMLP
from nrcg.diffusion.noise import spawn_seed
from nrcg.diffusion.objectives import Objective
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import DataError
from nrcg.training.trainer import Trainer


def train_points(
    config: DensitiesConfig,
    objective: ObjectiveConfig,
    points: Tensor,
    *,
    device: torch.device,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[PointMLP, float]:
    """Train a PointMLP.

    Args:
        config: Network, schedule and training.
        objective: What it predicts, and the weighting; t is drawn uniformly.
        points: (N, 2); each step draws from them anew.
        device: Device that computes.
        on_step: Called after each step with the number of steps done.

    Returns:
        The network with the average of its weights, frozen, and the mean loss of the last tenth of the steps.

    Raises:
        DataError: The loss is not finite.
    """
    schedule = Schedule.from_config(config.schedule)
    loss_of = Objective(objective, schedule)
    points = points.to(device, torch.float32)[..., None, None]
    torch.manual_seed(spawn_seed(config.seed, 0, 2))
    net = PointMLP(points.shape[1], config.width, config.num_blocks).to(device)
    trainer = Trainer(net, config.optimizer, config.num_steps, device, torch.float32)
    ema = EMAModel(net.parameters(), decay=config.ema_decay, foreach=True)
    generator = torch.Generator(device).manual_seed(spawn_seed(config.seed, 1, 2))
    tail, last = max(1, config.num_steps // 10), torch.zeros((), device=device)
    for step in range(config.num_steps):
        x0 = points[torch.randint(len(points), (config.batch_size,), generator=generator, device=device)]
        t = torch.randint(1, schedule.num_steps + 1, (len(x0),), generator=generator, device=device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        loss = loss_of.loss(net(schedule.q_sample(x0, t, noise), t - 1).sample, x0, noise, t)
        trainer.backward(loss)
        trainer.update()
        ema.step(net.parameters())
        if step >= config.num_steps - tail:
            last += loss.detach() / tail
        on_step(step + 1)
    if not torch.isfinite(last):
        raise DataError("the loss is not finite; lower densities.optimizer.learning_rate")
    ema.copy_to(net.parameters())
    return freeze(net), float(last)
