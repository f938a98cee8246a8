"""Files that are whole or not there: written under a temporary name, then moved."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nrcg.errors import DataError


def temporary_name(path: str | Path) -> Path:
    """A name beside `path` (so that the move is atomic) that no other process uses."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write a file as a whole; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8; makes its folder."""
    atomic_write(path, text.encode())


def atomic_save_array(path: str | Path, array) -> None:
    """Write a numpy array as a .npy file as a whole, without pickles; makes its folder."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    atomic_write(path, content.getvalue())


def replace_folder(new: str | Path, final: str | Path) -> None:
    """Put the folder `new` in the place of `final`, which may exist."""
    new, final = Path(new), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.replace(old)
    try:
        new.replace(final)
    except OSError:
        if old.exists():
            old.replace(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


_locks: list[IO[str]] = []
"""Lock files of this process, kept open until it ends."""


def try_lock(path: str | Path) -> bool:
    """Lock a file until this process ends; False where another process holds it.

    The kernel lets go of it when the process ends, also after a kill -9, so that no lock is ever stale.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  (held until the process ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _locks.append(file)
    return True


@contextmanager
def exclusive(path: str | Path, message: str) -> Iterator[None]:
    """Hold a lock file for a while. As with `try_lock`, a process that was killed holds none.

    Raises:
        DataError: with `message`, where another process, or another caller in this one, holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(message) from None
        yield


def join_group(path: str | Path) -> bool:
    """Become one of the processes that share a lock file, until this process ends; True where it was the first.

    As with `try_lock`, a process that was killed is no longer one of them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115  (held until the process ends)
    _locks.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first = True
    except BlockingIOError:
        first = False
    fcntl.flock(file, fcntl.LOCK_SH)
    return first


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
