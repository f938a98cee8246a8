"""What the guidance did, step by step: the record behind `pipe(..., trace=True)`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nrcg.diffusion.objectives import Prediction
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import DataError
from nrcg.files import atomic_save_arrays
from nrcg.guidance.guidance import ClassifierGuidance
from nrcg.guidance.targets import log_prob_of


@dataclass
class Trace:
    """A run's trajectories, one row a sample and one column a step, from t = T down. Not a number where there is none:
    the first step has no cosine, a step without a new gradient (every_k) has no gradient.

    Attributes:
        t: (S,) int64, the steps.
        grad_norm: (N, S) 2-norm of the gradient g_t, before the stabilizer.
        grad_cosine: (N, S) cosine between g_t and the gradient before it.
        guide_norm: (N, S) 2-norm of what the stabilizer made of it, before the scale.
        guide_cosine: (N, S) cosine between that and the last step's.
        log_prob: (N, S) log p(target) of what the classifier saw, or what another target says.
        clipped: (N, S) share of x0hat's pixels outside [-1, 1].
    """

    t: NDArray[np.int64]
    grad_norm: NDArray[np.float32]
    grad_cosine: NDArray[np.float32]
    guide_norm: NDArray[np.float32]
    guide_cosine: NDArray[np.float32]
    log_prob: NDArray[np.float32]
    clipped: NDArray[np.float32]

    def save(self, path: str | Path) -> None:
        """Write the arrays as .npz, as a whole."""
        atomic_save_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote. Raises DataError: missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except Exception as error:  # zipfile's, zlib's and numpy's own
            raise DataError(f"no trace ({type(error).__name__}: {error})", path) from error

    @classmethod
    def join(cls, parts: list[Trace]) -> Trace:
        """Traces of the same steps, one after the other. Raises ValueError: none, or other steps."""
        if not parts or any(not np.array_equal(part.t, parts[0].t) for part in parts):
            raise ValueError("traces of the same steps are needed, at least one")
        return cls(parts[0].t, *(np.concatenate([getattr(part, name) for part in parts]) for name in QUANTITIES))

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """(S,) mean over the samples of each quantity, without those that are not a number."""
        means = {}
        for name in QUANTITIES:
            values = getattr(self, name)
            count = np.isfinite(values).sum(axis=0)
            means[name] = np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan).astype(np.float32)
        return means


QUANTITIES = tuple(field.name for field in fields(Trace) if field.name != "t")


class TraceRecorder:
    """Watches one batch of trajectories; the last gradients stay on the device, numbers are fetched at the end."""

    def __init__(self) -> None:
        self._t: list[int] = []
        self._rows: dict[str, list[Tensor]] = {name: [] for name in QUANTITIES}
        self._before: dict[str, Tensor] = {}

    def record(self, x_t: Tensor, t: int, prediction: Prediction, guidance: ClassifierGuidance, schedule: Schedule):
        """One step, after the guidance was called for it."""
        self._t.append(t)
        nothing = torch.full((len(x_t),), torch.nan, device=x_t.device)
        found = {"guide_norm": _norm(guidance.guide), "guide_cosine": self._cosine("guide", guidance.guide, nothing)}
        if guidance.fresh:
            found |= {
                "grad_norm": _norm(guidance.last.grad),
                "grad_cosine": self._cosine("grad", guidance.last.grad, nothing),
                "log_prob": log_prob_of(guidance.last.logits, guidance.target),
            }
        x0 = prediction.pred_x0(x_t, t, schedule)
        found["clipped"] = (x0.abs() > 1.0).float().mean(dim=(1, 2, 3))
        for name, rows in self._rows.items():
            rows.append(found.get(name, nothing))

    def _cosine(self, name: str, now: Tensor, nothing: Tensor) -> Tensor:
        before, self._before[name] = self._before.get(name), now
        if before is None:
            return nothing
        # In float64: squares of gradients as small as 1e-25 are lost in float32.
        now, before = now.flatten(1).double(), before.flatten(1).double()
        sizes = now.norm(dim=1) * before.norm(dim=1)
        return torch.where(sizes > 0, (now * before).sum(dim=1) / sizes, torch.nan).float()

    def result(self, num_samples: int) -> Trace:
        """The trace so far, of the first samples; without a column where no step was guided, such as DDPM's last."""
        if not self._t:
            return Trace(np.empty(0, np.int64), *(np.empty((num_samples, 0), np.float32) for _ in QUANTITIES))
        arrays = {
            name: torch.stack(rows, dim=1)[:num_samples].float().cpu().numpy() for name, rows in self._rows.items()
        }
        return Trace(t=np.array(self._t, np.int64), **arrays)


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).double().norm(dim=1).float()
