"""Several processes that train together: how they start, end, and share a batch.

`launch` starts a command once per process; each then calls `join`. torchrun and `accelerate launch` may start them
too. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO, TYPE_CHECKING

from nrcg.errors import ConfigError, DataError
from nrcg.processes import launched

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn


PARENT = "NRCG_LAUNCHER"
"""Environment variable with the process number of `launch`: a rank ends with it (see nrcg.cli)."""
POLL_SECONDS = 0.1
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


def launch(command: Sequence[str], count: int, environment: Mapping[str, str] | None = None) -> int:
    """Run a command `count` times, as the ranks of one training. Where one fails, all end.

    Rank 0 has this process's output; what the others say on stderr is shown if one of them fails first.

    Args:
        environment: added to this process's.

    Returns:
        0, or the exit status of the rank that failed first, 128 + N if signal N ended it.
    """
    from torch.distributed import TCPStore

    # The processes find together here. As it is open before they start, no port can be taken meanwhile.
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = {
        **os.environ,
        **(environment or {}),
        PARENT: str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for a store that the parent holds
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminating())
        stack.callback(_end, ranks)
        errors: list[IO[bytes] | None] = [None]
        for rank in range(count):
            if rank > 0:
                errors.append(stack.enter_context(tempfile.TemporaryFile()))
            ranks.append(
                subprocess.Popen(
                    list(command),
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=errors[rank],
                )
            )
        while True:
            states = [process.poll() for process in ranks]
            failed = [rank for rank, state in enumerate(states) if state not in (None, 0)]
            if failed:
                first, state = failed[0], states[failed[0]]
                _end(ranks)
                if errors[first] is not None:
                    errors[first].seek(0)
                    sys.stderr.write(errors[first].read().decode(errors="replace"))
                if state < 0:
                    print(f"nrcg: process {first} of {count} was ended by signal {-state}", file=sys.stderr)
                return state if state > 0 else 128 - state
            if None not in states:
                return 0
            time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()  # checkpoints are written as a whole: nothing is lost that a kill would not lose
    for process in ranks:
        process.wait()


@contextlib.contextmanager
def _terminating():
    """SIGTERM ends the block as an exception, so that the ranks are ended too."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
