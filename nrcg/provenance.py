"""What made a file: the versions of the software, and the git commit."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

from nrcg import __version__


def git_commit() -> str:
    """HEAD of the working directory's checkout, "-dirty" behind it if tracked files differ; else "unknown"."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git_branch() -> str:
    """The checked-out branch, or the name of the DVC experiment that runs; "unknown" without a checkout."""
    try:
        return os.environ.get("DVC_EXP_NAME") or _git("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def git_file(revision: str, path: str) -> str | None:
    """A file's text at a git revision; None where it has none."""
    try:
        return _git("show", f"{revision}:./{path}") + "\n"
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    # Without the optional lock, so that a run never gets in the way of the user's own git.
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of what made a file."""
    names = ("torch", "diffusers", "torchvision", "numpy")
    return {"nrcg": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}
