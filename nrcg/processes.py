"""Processes that end with the one that started them, and the processors they may use."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent ends, also by kill -9. Linux only; elsewhere nothing happens.

    Args:
        parent: its process number; where it has ended already, this process ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def processors() -> int:
    """Processors this process may use; not every system can tell them from all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int | None,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yield work(item) in order, from threads, with few items and results waiting.

    Args:
        items: taken one by one as they are needed, in the caller's thread.
        workers: threads; None is one per processor this process may use.
        initializer: called at the start of each thread.
    """
    workers = workers or processors()
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(workers, initializer=initializer) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def launched() -> bool:
    """Whether this is one of several processes that `launch`, torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
