"""What a tracked run logged, on disk before it is sent: a tracking store that is down, or a kill, loses nothing.

A journal is `<folder>/<uid>.jsonl`, one entry a line, with the files it refers to in `<folder>/<uid>.files/`. Its
process holds a lock on it, which the kernel takes back however that process ends, so that nobody sends a journal that
is still being written. Each line holds a checksum: one that has changed is left out, and once the others are sent the
journal is set aside as NAME.damaged.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ENDING = ".jsonl"
DAMAGED = ".damaged"
CHECKSUM = "crc32"
"""Key of a line's checksum: of all its other keys."""


class Journal:
    """Entries of one run, the first `sent` of which are in the store as the run `run_id`.

    Where `damage` says which line was left out, `sent` is 0: positions have moved, and an entry may be sent twice.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.uid = path.name.removesuffix(ENDING)
        self.entries: list[dict[str, Any]] = []
        self.sent = 0
        self.run_id = ""
        self.damage = ""
        self._files = path.with_suffix(".files")

    @classmethod
    def create(cls, folder: Path) -> Journal:
        """A new journal, locked until it is closed. Names sort by the time of their making."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}{ENDING}"
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(path, file)

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """A journal that its process left behind; None where one is at work on it, or has just removed it."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:
                raise BlockingIOError
        except BlockingIOError:
            file.close()
            return None
        journal = cls(path, file)
        journal._read()
        return journal

    def append(self, op: str, **fields: Any) -> None:
        """Add an entry, {"op": op, ...}; on disk when this returns."""
        entry = {"op": op, **fields}
        self._write(entry)
        self.entries.append(entry)

    def mark_sent(self, count: int, run_id: str) -> None:
        """The first `count` entries are in the store."""
        self._write({"op": "sent", "count": count, "run_id": run_id})
        self.sent, self.run_id = count, run_id

    def keep(self, path: str | os.PathLike) -> str:
        """Copy a file, which may be gone when it is sent; returns the copy's path."""
        folder = self._files / str(len(self.entries))
        folder.mkdir(parents=True, exist_ok=True)
        return os.fspath(shutil.copy(path, folder / Path(path).name))

    def close(self) -> None:
        """Leave the journal to whoever sends it."""
        self._file.close()

    def remove(self) -> None:
        """All that can be read is sent."""
        if self.damage:
            self.path.replace(f"{self.path}{DAMAGED}")
        else:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self._files, ignore_errors=True)
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        if not self.damage:  # which stays as it was found
            self._file.write(json.dumps(entry | {CHECKSUM: _checksum(entry)}).encode() + b"\n")
            self._file.flush()

    def _read(self) -> None:
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # a kill while it was written
                self._file.truncate(whole)
                break
            whole += len(line)
            try:
                entry = json.loads(line)
                if entry.pop(CHECKSUM) != _checksum(entry):
                    raise ValueError
            except (ValueError, AttributeError, KeyError, TypeError):
                self.damage = f"line {number} has changed since it was written"
                continue
            if entry["op"] == "sent":
                self.sent, self.run_id = entry["count"], entry["run_id"]
            else:
                self.entries.append(entry)
        if self.damage:
            self.sent = 0
        self._file.seek(0, os.SEEK_END)


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def left_behind(folder: Path) -> Iterator[Journal]:
    """Journals that no living process holds, in the order of their starts. Close or remove each."""
    for path in sorted(folder.glob(f"*{ENDING}")):
        journal = Journal.open(path)
        if journal is None:
            continue
        if journal.entries or journal.damage:
            yield journal
        else:  # killed before it said what it is
            journal.remove()
