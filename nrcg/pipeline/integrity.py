"""Damage that is found before anything runs. Imports neither numpy nor torch: the Snakefile asks.

A shard stands beside a record that holds its SHA-256. One that is no longer what its record says is set aside as
NAME.damaged; then Snakemake misses it and makes it anew. Data and weights are compared with their records too, but what
is damaged is refused: making them anew may take days. Snakemake does not start with them: it would take a damaged
record for a newer one and delete what was made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nrcg.config import ROLES
from nrcg.errors import DataError
from nrcg.files import SEAL, atomic_write_text, read_record, sha256_file

ENDING = ".damaged"
SHARDS = "results/*/samples/*/scale*/"
WEIGHTS = {
    "training.json": "unet/diffusion_pytorch_model.safetensors",  # of records that do not list every file
    "config.json": "model.safetensors",
}
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
                self._known[name] = (state, digest)
            except (ValueError, TypeError):  # a kill may cut off a line
                continue
        if len(lines) > 2 * len(self._known) + 1000:
            entries = [json.dumps([name, *known]) + "\n" for name, known in self._known.items()]
            atomic_write_text(self.path, "".join(entries))

    def match(self, path: Path, expected: str) -> bool:
        """Whether a file has this SHA-256; where the cache denies it, which may be damaged too, the file is read.

        Raises OSError.
        """
        return expected == self.sha256(path) or expected == self.sha256(path, afresh=True)

    def sha256(self, path: Path, *, afresh: bool = False) -> str:
        """Hex SHA-256 of a file; afresh: read it in any case. Raises OSError."""
        about, name = path.stat(), str(path.absolute())
        # ctime too: it changes with every write, also where somebody sets the time of change back.
        state = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        known = self._known.get(name)
        if known is not None and known[0] == state and not afresh:
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
    """Arrays and records of shards below `root`/results that are not what was written, each with the reason.

    Where a shard's trace is damaged or lost it is the array that is named: both are drawn at once.
    """
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
        if not images.exists():
            continue
        if not sums.match(images, content["sha256"]):
            yield images, f"is not what {record.name} says (checksum)"
        elif "trace_sha256" in content:
            trace = record.with_suffix(".trace.npz")
            if not trace.is_file():
                yield images, f"has lost its {trace.name}"
            elif not sums.match(trace, content["trace_sha256"]):
                yield images, f"has a damaged {trace.name} (checksum)"


def damaged_sources(root: Path, *, datasets: Iterable[str], experiments: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Files of data sets and models below `root` that are not what was written, each with the reason and what to do.

    What is not there is no damage, nor is what no record vouches for: a training that goes on or was killed leaves
    files without their record, and writes that last.
    """
    sums = Sums(root / CACHE)
    records = [root / "data" / name / "dataset.json" for name in datasets]
    for name in experiments:
        models = root / "models" / name
        records += [models / "ddpm" / "training.json"]
        records += [models / "classifiers" / role / "config.json" for role in ROLES]
    for record in records:
        if not record.exists():
            continue
        try:
            content = read_record(record)
            stated = _stated(record.name, content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            yield record, f"damaged ({error})"
            continue
        for name, expected in stated.items():
            path = record.parent / name
            try:
                if not path.is_file() or sums.match(path, expected):
                    continue
                reason = f"not what {record.name} says, checksum"
            except OSError as error:
                reason = str(error)
            yield path, f"damaged ({reason})"


def _stated(kind: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Names of files beside a record -> the SHA-256 that it states."""
    if kind == "dataset.json":
        return {
            f"{split}/{name}.npy": digest
            for split, entry in record.get("splits", {}).items()
            for name, digest in entry.get("sha256", {}).items()
        }
    if record.get("files"):
        return dict(record["files"])
    return {WEIGHTS[kind]: record["sha256"]} if record.get("sha256") else {}


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
