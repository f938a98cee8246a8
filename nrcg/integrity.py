"""What damage the workflow finds before it starts. Imports neither numpy nor torch: the Snakefile asks.

Shards, weights and arrays stand beside a record that holds their SHA-256. A file that no longer is what its record says
is set aside as NAME.damaged; then Snakemake misses it and makes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from nrcg.files import SEAL, atomic_write_text, read_record, sha256_file

ENDING = ".damaged"
CACHE = ".nrcg/sums.jsonl"
"""Where checksums are kept with the files' size and times; safe to delete."""
WEIGHTS = {
    "ddpm": ("training.json", "unet/diffusion_pytorch_model.safetensors"),
    "classifiers/*": ("config.json", "model.safetensors"),
}
"""Folders of an experiment's models -> record, weights."""


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


def damaged_files(root: Path, drawn: Collection[str] = (), sums: Sums | None = None) -> Iterator[tuple[Path, str]]:
    """Files that are not what was written, each with the reason.

    Left out is what the workflow could not make anew by itself: imported models, and data sets made of somebody's
    images. The verbs that read those refuse them.

    Args:
        root: the folder that holds data, models and results.
        drawn: names of the data sets that are drawn.
        sums: where checksums come from.
    """
    sums = sums or Sums(root / CACHE)
    for path in sorted(root.glob("results/*/samples/*/scale*/shard*.json")):
        yield from _against(path, {path.with_suffix(".npy"): ("sha256",)}, sums, sealed=True)
    for folder, (name, weights) in WEIGHTS.items():
        for path in sorted(root.glob(f"models/*/{folder}/{name}")):
            try:
                if "imported" in read_record(path):
                    continue
            except (OSError, ValueError):
                continue
            yield from _against(path, {path.parent / weights: ("sha256",)}, sums)
    for name in drawn:
        path = root / "data" / name / "dataset.json"
        arrays = (("train", "images"), ("train", "labels"), ("train", "mean"), ("val", "images"), ("val", "labels"))
        keys = {path.parent / split / f"{array}.npy": ("splits", split, "sha256", array) for split, array in arrays}
        yield from _against(path, keys, sums)


def _against(
    record: Path, files: dict[Path, tuple[str, ...]], sums: Sums, *, sealed: bool = False
) -> Iterator[tuple[Path, str]]:
    """Files against their record; the keys lead to the checksum."""
    if not record.exists():
        return
    try:
        content = read_record(record)
        if sealed and SEAL not in content:
            raise ValueError(f"{SEAL} is missing")
        expected = {}
        for path, keys in files.items():
            value = content
            for key in keys:
                value = value[key]
            expected[path] = value
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield record, f"is damaged ({error})"
        return
    for path, digest in expected.items():
        if path.exists() and sums.sha256(path) != digest:
            yield path, f"is not what {record.name} says (checksum)"


def set_aside_damaged(root: Path, drawn: Collection[str] = ()) -> list[str]:
    """Rename damaged files to NAME.damaged, and remove those that have been made anew; a line about each new one."""
    for path in files_set_aside(root):
        if path.exists():
            _aside(path).unlink()
    lines = []
    for path, reason in damaged_files(root, drawn):
        path.replace(_aside(path))
        lines.append(f"{path}: {reason}; set aside as {_aside(path).name}, to be made anew")
    return lines


def files_set_aside(root: Path) -> list[Path]:
    """Files that lie set aside as damaged, under the names that they had."""
    patterns = ("data/*/**/*", "models/*/*/**/*", "results/*/samples/*/scale*/*")
    return sorted(path.with_suffix("") for pattern in patterns for path in root.glob(f"{pattern}{ENDING}"))


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{ENDING}")
