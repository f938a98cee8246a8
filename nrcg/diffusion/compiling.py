"""When torch.compile pays for a U-Net, and the compiled network.

Compilation fuses copies between types, norms and activations; convolutions and attention stay as they are. It computes
what the network does, up to rounding. What it takes at the start it gives back in long jobs alone. What it makes is
kept in the folder that TORCHINDUCTOR_CACHE_DIR names, so that the next job starts in seconds.

CUDA graphs, beyond that, send all kernels of a pass to the GPU at once: small batches, whose kernels end before the
next is launched, gain by it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nrcg.config import COMPILE

logger = logging.getLogger(__name__)

Compiled = Literal["off", "on", "graphs"]
"""What `auto` is resolved to, too."""
BACKEND = "inductor"
GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
"""A graph for the one size of batch; what is compiled for any size is launched kernel by kernel. None on a CPU."""
WORTH_FLOP = 6e15
"""Forward arithmetic of a job from which on it is compiled. An H100 needs 260 s for that without (22.4 M parameters at
64 x 64, guided, in bfloat16), of which the compiled network saves a third, as much as the compilation takes: 91 s."""
WORTH_STEPS = 2000
"""Steps from which on the training of a small classifier is compiled, which the launching of kernels bounds."""


def resolve_compile(
    choice: str, device: torch.device, work: Callable[[], float], worth: float = WORTH_FLOP
) -> Compiled:
    """`auto`: `on` on a GPU where work() reaches what makes it worth while, `off` elsewhere; the others as they are.

    Raises:
        ValueError: Another choice.
    """
    if choice not in COMPILE:
        raise ValueError(f"compile: {choice!r} is unknown; allowed: {', '.join(COMPILE)}")
    if choice == "auto":
        return "on" if device.type == "cuda" and work() >= worth else "off"
    return choice  # type: ignore[return-value]


@torch.no_grad()
def forward_flop(unet: nn.Module, shape: Sequence[int], *others: Tensor) -> float:
    """Floating-point operations of one image (C, H, W), and what else it takes, through a U-Net, by a pass that counts
    them."""
    from torch.utils.flop_counter import FlopCounterMode

    one = next(unet.parameters())
    with FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, *shape, device=one.device, dtype=one.dtype), torch.zeros(1, device=one.device), *others)
    return float(counter.get_total_flops())


def compile_in_place(module: nn.Module) -> None:
    """Compile what a module computes, at its first call; its parameters and their names stay."""
    module.compile(backend=BACKEND)


def compiled_unet(unet: nn.Module, compiled: Compiled = "on") -> Callable[..., Tensor]:
    """(x_t, timesteps, ...) -> what the U-Net says, compiled at the first call; again once, for any size, where the
    size of the batch changes. Where the compiler fails, such as without a C compiler, the network runs as it is."""

    def forward(*inputs: Tensor) -> Tensor:
        return unet(*inputs, return_dict=False)[0]

    if compiled == "off":
        return forward
    run = torch.compile(forward, backend=BACKEND, options=GRAPHS if compiled == "graphs" else None)

    def compiled_or_not(*inputs: Tensor) -> Tensor:
        nonlocal run
        try:
            return run(*inputs)
        except Exception as error:
            if run is forward or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            logger.warning("the U-Net is not compiled: %s", " ".join(str(error).split())[:200])
            run = forward
            return run(*inputs)

    return _copied(compiled_or_not) if compiled == "graphs" else compiled_or_not


def _copied(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with an output and a gradient of x_t of their own: a graph writes all its results to the same memory."""

    def own(x: Tensor, *others: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)
            x.register_hook(torch.clone)
        return run(x, *others).clone()

    return own
