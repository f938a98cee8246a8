"""Files that are whole or not there: written under a temporary name, then moved."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nrcg.errors import DataError


def temporary_name(path: str | Path) -> Path:
    """A name beside `path` (so that the move is atomic) that no other process uses."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def remove_leftovers(folder: str | Path) -> None:
    """Remove what processes of this machine that were killed have left under their temporary names."""
    ending = re.compile(rf"\.{re.escape(os.uname().nodename)}\.(\d+)\.(tmp|old)$")
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            match = ending.search(name)
            if match is None or not name.startswith(".") or Path("/proc", match[1]).exists():
                continue
            path = Path(parent, name)
            if name in folders:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A failure to write becomes an OSError that names the file, whichever library writes.

    They report a full disk in many ways, some without its name, some without the file's.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:
        if not _disk_is_full(path, error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _disk_is_full(path: Path, error: Exception) -> bool:
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(folder).free < 2**16


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write a file as a whole; makes its folder. Raises OSError that names it."""
    path = Path(path)
    temporary = temporary_name(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def atomic_save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy arrays by name as a .npz file as a whole; makes its folder. They may be large: nothing is copied."""
    import numpy as np

    temporary = temporary_name(path)
    with naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_arrays(path: str | Path) -> dict[str, Any]:
    """The numpy arrays of a .npz file by name, in memory. Raises DataError that names it where it cannot be read."""
    import numpy as np

    try:
        # Opened here: np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"damaged ({error})", path) from None


SEAL = "record_sha256"
"""Key of a JSON record's own checksum: of all its other keys."""


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file that says what made something, with a checksum of itself."""
    plain = {key: value for key, value in json.loads(json.dumps(record)).items() if key != SEAL}  # of a record read
    atomic_write_text(path, json.dumps(plain | {SEAL: _seal(plain)}, indent=2) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read what `write_record` wrote; a record without its checksum, of an earlier version, is taken as it is.

    Raises:
        OSError: it cannot be read.
        ValueError: it is cut off or has changed since it was written.
    """
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError("no record")
    if SEAL in record and record[SEAL] != _seal({key: value for key, value in record.items() if key != SEAL}):
        raise ValueError("has changed since it was written")
    last = next(reversed(record), SEAL)
    if SEAL not in record and record.get(last) == _seal({key: record[key] for key in record if key != last}):
        raise ValueError(f"has changed since it was written: the key {last!r} was {SEAL}")
    return record


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def replace_folder(new: str | Path, final: str | Path) -> None:
    """Put the folder `new` in the place of `final`, which may exist."""
    new, final = Path(new), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.{os.uname().nodename}.{os.getpid()}.old")
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


def join_group(path: str | Path, alone: Callable[[], object] = lambda: None) -> bool:
    """Become one of the processes that share a lock file, until this process ends; True where it was the first.

    As with `try_lock`, a process that was killed is no longer one of them.

    Args:
        alone: called where this process is the first; until it returns, no other can join.
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
    if first:
        alone()
    fcntl.flock(file, fcntl.LOCK_SH)
    return first


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: str | Path) -> str | None:
    """SHA-256 of a model's weights as its own record states it; None for a model without one.

    Raises:
        DataError: the record is damaged.
    """
    for name in ("training.json", "config.json"):
        path = Path(folder) / name
        if path.exists():
            try:
                return read_record(path).get("sha256")
            except (OSError, ValueError) as error:
                raise DataError(f"damaged ({error})", path) from None
    return None


def may_be_hub_id(name: str | Path) -> bool:
    """Whether a name can be a model's id on the hub, OWNER/NAME; what cannot is not looked for over the network."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None


def check_hub_id(name: str | Path, said: str | None = None) -> None:
    """Raises DataError: a name, which is no folder, can be no id of the hub; `said`: how the user wrote it."""
    if not may_be_hub_id(name):
        raise DataError(f"{said or name}: no such folder, and no id of the hub, OWNER/NAME")


def refuse_pointer(path: str | Path) -> None:
    """Raises DataError where a file is a Git LFS pointer and not the weights themselves."""
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull in its clone")
