"""Damage that is found before anything runs. Imports neither numpy nor torch: the Snakefile asks.

A shard stands beside a record that holds its SHA-256. One that is no longer what its record says is set aside as
NAME.damaged; then Snakemake misses it and makes it anew. So are tables, figures and the report where they are cut off.
Data and weights are compared with their records by the verbs that read them, which refuse what is damaged: making them
anew may take days, and imported ones cannot be.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from nrcg.files import SEAL, atomic_write_text, read_record, sha256_file

ENDING = ".damaged"
SHARDS = "results/*/samples/*/scale*/"
TABLES = tuple(
    f"results/*/{name}"
    for name in (
        *("reference.json", "forward.csv", "metrics/*.csv", "metrics.csv", "summary.json"),
        *("figures/*.png", "figures/*.svg", "report.html"),
    )
)
LAST_BYTES = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>", ".html": b"</html>"}
CACHE = ".nrcg/sums.jsonl"
"""Where checksums are kept with the files' size and times; safe to delete."""


class Sums:
    """SHA-256 of files, which are read again only when their size, times or place have changed.

    Several processes may add to one cache at a time: each line is a checksum of its own.
    """

    def __init__(self, path: str | Path = CACHE) -> None:
        self.path = Path(path)
        self._known: dict[str, tuple[list[int], str]] = {}
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                name, state, digest = json.loads(line)
            except ValueError:  # a kill may cut off a line
                continue
            self._known[name] = (state, digest)
        if len(lines) > 2 * len(self._known) + 1000:
            entries = [json.dumps([name, *known]) + "\n" for name, known in self._known.items()]
            atomic_write_text(self.path, "".join(entries))

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a file. Raises OSError."""
        about, name = path.stat(), str(path.absolute())
        # ctime too: it changes with every write, also where somebody sets the time of change back.
        state = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1]
        digest = sha256_file(path)
        self._known[name] = (state, digest)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, state, digest]) + "\n")
        except OSError:  # a full disk: the file is read again next time
            pass
        return digest


def damaged_shards(root: Path, sums: Sums | None = None) -> Iterator[tuple[Path, str]]:
    """Arrays and records of shards below `root`/results that are not what was written, each with the reason."""
    sums = sums or Sums(root / CACHE)
    for record in sorted(root.glob(f"{SHARDS}shard*.json")):
        images = record.with_suffix(".npy")
        try:
            content = read_record(record)
            if not content.keys() >= {SEAL, "sha256"}:
                raise ValueError("a key is missing")
        except (OSError, ValueError) as error:
            yield record, f"is damaged ({error})"
            continue
        if images.exists() and sums.sha256(images) != content["sha256"]:
            yield images, f"is not what {record.name} says (checksum)"


def cut_off(root: Path) -> Iterator[tuple[Path, str]]:
    """Results of the workflow below `root`/results that are no whole file of their kind, each with the reason."""
    for pattern in TABLES:
        for path in sorted(root.glob(pattern)):
            try:
                content = path.read_bytes()
                if path.suffix == ".csv":
                    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
                    whole = content.endswith(b"\n") and len(rows) > 1 and len({len(row) for row in rows}) == 1
                elif path.suffix == ".json":
                    whole = isinstance(json.loads(content), dict)
                else:
                    whole = content.rstrip().endswith(LAST_BYTES[path.suffix])
            except (OSError, ValueError, csv.Error):
                whole = False
            if not whole:
                yield path, "is cut off or damaged"


def set_aside_damaged(root: Path) -> list[str]:
    """Rename damaged files to NAME.damaged, and remove those that have been made anew; a line about each new one."""
    for pattern in (f"{SHARDS}*", *TABLES):
        for old in root.glob(pattern + ENDING):
            if old.with_suffix("").exists():
                old.unlink()
    lines = []
    for path, reason in (*damaged_shards(root), *cut_off(root)):
        path.replace(path.with_name(f"{path.name}{ENDING}"))
        lines.append(f"{path}: {reason}; set aside as {path.name}{ENDING}, to be made anew")
    return lines
