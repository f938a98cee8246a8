"""What every training needs: optimiser, checkpoints, noise of a step, micro-batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nrcg.batching import is_out_of_memory
from nrcg.config import OptimizerConfig
from nrcg.diffusion.noise import spawn_seed
from nrcg.errors import DataError
from nrcg.files import naming

LogRow = dict[str, float]
OnStep = Callable[[int], None]
OnEpoch = Callable[[LogRow], None]


@dataclass
class Trainer:
    """AdamW with warm-up and cosine decay, gradient clipping, and loss scaling under float16."""

    module: nn.Module
    config: OptimizerConfig
    total_steps: int
    device: torch.device
    precision: torch.dtype
    step: int = 0
    log: list[LogRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        from diffusers.optimization import get_cosine_schedule_with_warmup

        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=self.device.type == "cuda",  # one kernel for all parameters
        )
        warmup = min(self.config.warmup_steps, self.total_steps // 2)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add a float32 loss's gradient."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """One optimiser step from the gradients added since the last."""
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def state_dict(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "log": self.log,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("module", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.log = state["step"], state["log"]


class Checkpoint:
    """A training's state in one file, which only the very same training takes up again.

    Args:
        path: of the file.
        identity: fingerprint of everything that shapes the training: settings and data.
        minutes: a checkpoint at least this often.
    """

    def __init__(self, path: Path, identity: str, minutes: float):
        self.path, self.identity, self.seconds = path, identity, 60 * minutes
        # The same name in every process: what a kill left half written is written over, not left behind.
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._saved = time.monotonic()

    def load(self) -> dict | None:
        """The state, or None where there is none that fits; a damaged or foreign one is left aside."""
        try:
            # weights_only: no code is run from the file.
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            print(f"{self.path}: damaged ({type(error).__name__}), training starts anew")
            return None
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            print(f"{self.path}: from other settings or data, training starts anew")
            return None
        return state

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.seconds

    def save(self, state: dict) -> None:
        try:
            with naming(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state | {"identity": self.identity}, self._temporary)
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)


def step_noise(
    seed: int, step: int, shape: Sequence[int], num_steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """t (B,) uniform over 1..T and eps (B, C, H, W), of one training step."""
    generator = torch.Generator(device).manual_seed(spawn_seed(seed, step, 1))
    t = torch.randint(1, num_steps + 1, (shape[0],), generator=generator, device=device)
    return t, torch.randn(tuple(shape), generator=generator, device=device)


def chunks(start: int, stop: int, size: int | None) -> list[slice]:
    """Positions start..stop in pieces of at most `size`; None: in one."""
    size = size or max(stop - start, 1)
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@contextlib.contextmanager
def naming_memory(key: str, advice: str) -> Iterator[None]:
    """Out of memory becomes one line that names the key to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(f"{key}: out of memory; {advice}") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's default generators, on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
