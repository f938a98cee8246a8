"""Processes that end with the one that started them, and the processors they may use."""

from __future__ import annotations

import os
import sys

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
