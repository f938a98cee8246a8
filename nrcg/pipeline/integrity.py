"""Damage that is found before anything runs. Imports neither numpy nor torch: the Snakefile asks.

A shard stands beside a record that holds its SHA-256. One that is no longer what its record says is set aside as
NAME.damaged; then Snakemake misses it and makes it anew. Data and weights are compared with their records too, but what
is damaged is refused: making them anew may take days. Snakemake does not start with them: it would take a damaged
record for a newer one and delete what was made of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nrcg.config import ROLES
from nrcg.errors import DataError
from nrcg.files import SEAL, read_record, sha256_file
from nrcg.layout import DatasetPaths, ExperimentPaths, trace_of

ENDING = ".damaged"
SHARDS = "results/*/samples/*/scale*/"
CACHE = ".nrcg/sums.jsonl"
"""Where checksums are kept with the files' size and times; safe to delete."""


class Sums:
    """SHA-256 of files, which are read again only when their size, times or place have changed.

    Several processes may add to one cache at a time: each line is a checksum of its own.
    """

    def __init__(self, path: str | Path = CACHE) -> None:
        self.path = Path(path)
        self._known: dict[str, tuple[list[int], str]] = {}
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a kill may cut off a line
                name, state, digest = json.loads(line)
                self._known[name] = (state, digest)

    def match(self, path: Path, expected: str) -> bool:
        """Whether a file has this SHA-256; where the cache denies it, which may be damaged too, the file is read.

        Raises OSError.
        """
        return expected == self.sha256(path) or expected == sha256_file(path)

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a file. Raises OSError."""
        about, name = path.stat(), str(path.absolute())
        # ctime too: it changes with every write, also where somebody sets the time of change back.
        state = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        known, digest = self._known.get(name, ([], ""))
        if known != state:
            digest = sha256_file(path)
            self._known[name] = (state, digest)
            with contextlib.suppress(OSError):  # a full disk: the file is read again next time
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([name, state, digest]) + "\n")
        return digest


def damaged_shards(root: Path) -> Iterator[tuple[Path, str]]:
    """Arrays and records of shards below `root`/results that are not what was written, each with the reason.

    Where a shard's trace is damaged or lost it is the array that is named: both are drawn at once.
    """
    sums = Sums(root / CACHE)
    for record in sorted(root.glob(f"{SHARDS}shard*.json")):
        images = record.with_suffix(".npy")
        trace = trace_of(images)
        try:
            content = read_record(record)
            if not content.keys() >= {SEAL, "sha256"}:
                raise ValueError("a key is missing")
        except (OSError, ValueError) as error:
            yield record, f"is damaged ({error})"
            continue
        if not images.exists():
            continue
        if not sums.match(images, content["sha256"]):
            yield images, f"is not what {record.name} says (checksum)"
        elif "trace_sha256" in content and not (trace.is_file() and sums.match(trace, content["trace_sha256"])):
            yield images, f"has lost its {trace.name}, or it is damaged (checksum)"


def damaged_sources(root: Path, *, datasets: Iterable[str], experiments: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Files of data sets and models below `root` that are not what was written, each with the reason.

    What is not there is no damage, nor is what no record vouches for: a training that goes on or was killed leaves
    files without their record, and writes that last.
    """
    sums = Sums(root / CACHE)
    records = [DatasetPaths(name, root).manifest for name in datasets]
    for paths in (ExperimentPaths(name, root) for name in experiments):
        records += [paths.ddpm / "training.json", *(paths.classifier(role) / "config.json" for role in ROLES)]
    for record in filter(Path.exists, records):
        path = record
        try:
            for name, expected in _stated(record).items():
                path = record.parent / name
                if path.is_file() and not sums.match(path, expected):
                    yield path, f"damaged (not what {record.name} says, checksum)"
        except (OSError, ValueError) as error:
            yield path, f"damaged ({error})"


def _stated(path: Path) -> dict[str, str]:
    """Names of files beside a record -> the SHA-256 that it states. Raises OSError, ValueError."""
    record = read_record(path)
    if path.name == "dataset.json":
        return {
            f"{split}/{name}.npy": digest
            for split, entry in record.get("splits", {}).items()
            for name, digest in entry["sha256"].items()
        }
    weights = {"model.safetensors": record["sha256"]} if path.name == "config.json" and "sha256" in record else {}
    return record.get("files", weights)


def refuse_damaged_sources(root: Path, *, datasets: Iterable[str], experiments: Iterable[str]) -> None:
    """Raises DataError, one line, where data or weights are damaged."""
    for path, what in damaged_sources(root, datasets=datasets, experiments=experiments):
        raise DataError(what, path)


def set_aside_damaged(root: Path) -> list[str]:
    """Rename damaged files to NAME.damaged, and remove those that have been made anew; a line about each new one."""
    for old in root.glob(f"{SHARDS}*{ENDING}"):
        if old.with_suffix("").exists():
            old.unlink()
    lines = []
    for path, reason in damaged_shards(root):
        path.replace(path.with_name(f"{path.name}{ENDING}"))
        lines.append(f"{path}: {reason}; set aside as {path.name}{ENDING}, to be made anew")
    return lines
