"""Which steps t a training draws: uniformly, or more often those whose loss is large."""

from __future__ import annotations

import torch
from torch import Tensor

from nrcg.diffusion.noise import spawn_seed

MEMORY = 0.9
"""Share of the old second moment that an average keeps when a step is drawn again, as of the last ten draws."""
UNIFORM_SHARE = 1e-3
"""Share of the draws that are uniform, so that every t goes on being drawn."""
ENOUGH = 10
"""Draws of each t before the first that is not uniform."""


class ImportanceTimesteps:
    """Draws t in proportion to the root of the mean squared loss at each (Nichol and Dhariwal 2021, section 3.3).

    The loss of a draw is to be multiplied by 1 / (T p_t), so that its expectation is that of uniform draws.

    Args:
        num_steps: T.
        seed: of the training; step n's draws depend on it, n and the losses before.
        device: where the losses are.
    """

    def __init__(self, num_steps: int, seed: int, device: torch.device):
        self.num_steps, self.seed = num_steps, seed
        self.moments = torch.zeros(num_steps, device=device)
        self.counts = torch.zeros(num_steps, device=device)

    def chances(self) -> Tensor:
        """p_t (T,) of t = 1..T; uniform until each t was drawn `ENOUGH` times."""
        uniform = torch.full_like(self.moments, 1.0 / self.num_steps)
        size = self.moments.sqrt()
        chosen = (1 - UNIFORM_SHARE) * size / size.sum().clamp(min=torch.finfo().tiny) + UNIFORM_SHARE * uniform
        # Decided on the device: to ask for the counts would hold up a GPU at every step.
        return torch.where((self.counts >= ENOUGH).all() & (size.sum() > 0), chosen, uniform)

    def draw(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """t (B,) of a training's step, and the factors 1 / (T p_t) (B,) of their losses."""
        generator = torch.Generator(self.moments.device).manual_seed(spawn_seed(self.seed, step, 5))
        chances = self.chances()
        drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
        return drawn + 1, 1.0 / (self.num_steps * chances[drawn])

    def sums(self, t: Tensor, losses: Tensor) -> Tensor:
        """(2, T): sum of the squared losses at each t, and their number; of all processes these are added up."""
        sums = torch.zeros(2, self.num_steps, device=self.moments.device)
        sums[0].index_add_(0, t - 1, losses.detach().square())
        sums[1].index_add_(0, t - 1, torch.ones_like(losses))
        return sums

    def update(self, sums: Tensor) -> None:
        """Take in what `sums` gave."""
        squares, counts = sums
        seen = counts > 0
        now = squares / counts.clamp(min=1)
        kept = torch.where(self.counts > 0, MEMORY**counts, 0.0)
        self.moments = torch.where(seen, kept * self.moments + (1 - kept) * now, self.moments)
        self.counts = self.counts + counts

    def state_dict(self) -> dict[str, Tensor]:
        return {"moments": self.moments.cpu(), "counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.moments, self.counts = (state[name].to(self.moments.device) for name in ("moments", "counts"))
