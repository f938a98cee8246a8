"""Invocations of Snakemake, whose jobs are children of one run, and whether a process is alive."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from nrcg import __version__
from nrcg.provenance import git_branch

KIND_INVOCATION = "invocation"


def new_invocation() -> str:
    """A name for this process as an invocation, for NRCG_INVOCATION: time, host, process number and its start."""
    pid = os.getpid()
    return f"{time.strftime('%Y%m%dT%H%M%S')}_{socket.gethostname()}_{pid}_{process_start(pid)}"


def begun(invocation: str) -> float:
    """When an invocation was named, in seconds since the epoch."""
    return time.mktime(time.strptime(invocation.partition("_")[0], "%Y%m%dT%H%M%S"))


def invocation_tags(invocation: str) -> dict[str, str]:
    """Tags of the run of an invocation."""
    host, pid, started = invocation.partition("_")[2].rsplit("_", 2)
    return {
        "nrcg.kind": KIND_INVOCATION,
        "nrcg.invocation": invocation,
        "nrcg.host": host,
        "nrcg.pid": pid,
        "nrcg.process_started": started,
        "nrcg.git_branch": git_branch(),
        "nrcg.version": __version__,
    }


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that the tags of a run of this host name is at work."""
    pid = int(tags["nrcg.pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return tags["nrcg.process_started"] == process_start(pid)


def process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" where /proc does not say. Numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc(5); the name before may hold spaces
