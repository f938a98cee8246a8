"""Several processes that train together: how they start, end, and share a batch.

`launch`, torchrun or `accelerate launch` start them; each then calls `join`. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from nrcg.devices import cuda_uuids, lease_cuda_devices
from nrcg.errors import ConfigError, DataError
from nrcg.processes import launched

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn


TIMEOUT = timedelta(hours=6)
"""How long a rank waits for another, which may be drawing a sample grid. One that died is noticed at once."""


class Ranks:
    """This process among those that train together: numbered `rank` of `count`.

    Args:
        accelerator: of accelerate; None where there is one process.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes files and says how far it is."""
        return self.rank == 0

    def share(self, size: int) -> slice:
        """This process's part of `size` things; the parts follow each other and differ by one at most."""
        return slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes (DistributedDataParallel)."""
        return module if self._accelerator is None else self._accelerator.prepare_model(module)

    def no_sync(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """Backward passes in it keep their gradients to this process, to be averaged by the next one outside."""
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.no_sync(module)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on each of them."""
        return tensor if self._accelerator is None else self._accelerator.reduce(tensor, "sum")

    def check_equal(self, number: int, what: str) -> None:
        """Raises DataError where the processes differ in a number."""
        if self._accelerator is None:
            return
        import torch

        numbers = self._accelerator.gather(torch.tensor([number], device=self._accelerator.device)).tolist()
        if len(set(numbers)) > 1:
            raise DataError(f"{what} differs between the processes: {numbers}; do they see the same files?")

    def leave(self) -> None:
        """The process trains no more."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Meet the other processes; returns this one's place and device. Alone where nothing was launched.

    Raises:
        DataError: the processes did not find together.
    """
    if not launched():
        return Ranks(), device
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    threads = torch.get_num_threads()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or accelerate takes every core for each process
    asked = int(os.environ["WORLD_SIZE"])
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)]
    )
    if accelerator.num_processes != asked:
        raise DataError(f"{asked} processes were asked for, accelerate started {accelerator.num_processes}")
    torch.set_num_threads(threads)
    return Ranks(accelerator), accelerator.device


def num_processes(asked: int | str, device: torch.device, given: int | None) -> int:
    """How many processes train.

    Args:
        asked: `ddpm.num_processes`, a number or `auto`.
        given: GPUs that the job was given; None: all that are visible.

    Raises:
        ConfigError: more than there are GPUs.
    """
    import torch

    if device.type != "cuda":
        return 1 if asked == "auto" else asked
    if device.index is not None:
        if asked not in ("auto", 1):
            raise ConfigError(f"ddpm.num_processes: {asked} need device: cuda or auto, not {device}")
        return 1
    visible = torch.cuda.device_count()
    limit = min(visible, max(given, 1)) if given is not None else visible
    if asked == "auto":
        return limit
    if asked > visible:
        raise ConfigError(f"ddpm.num_processes: {asked}, but {visible} CUDA devices are visible; auto takes them all")
    return min(asked, limit)


def launch(arguments: Sequence[str], count: int, device: torch.device, *, lease: bool = False) -> int:
    """Run this interpreter `count` times, as the ranks of one training, by torchrun's agent. Where one fails, all end.

    Args:
        arguments: Of the interpreter, such as `-m nrcg.cli train-ddpm ...`.
        count: Number of processes.
        device: Kind of device that they train on.
        lease: Whether several jobs share the GPUs: they are leased until this process ends.

    Returns:
        0, or the exit status of the rank that failed first, 128 + N if signal N ended it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if device.type == "cuda" and lease:
        leased = lease_cuda_devices(cuda_uuids(), count)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(max(leased) + 1)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[position] for position in leased)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what is wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"nrcg-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        state = error.get_first_failure()[1].exitcode
        if state < 0:
            print(f"nrcg: one of {count} processes was ended by signal {-state}", file=sys.stderr)
        return state if state > 0 else 128 - state
    return 0
