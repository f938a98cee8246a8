"""Parquet files of images and labels, as the Hugging Face hub holds them.

A column of images (struct{bytes, path}, or binary) and one of labels. Where the schema's `huggingface` metadata names
the classes (a ClassLabel), a label is a number into these names. The split stands in a file's name
(train-00000-of-00006.parquet) or in its folder's (train/0000.parquet).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrcg.data.sources import Bytes, Encoded, Listing, Split, file_line, mixed_order, split_off
from nrcg.errors import ConfigError, DataError
from nrcg.files import exclusive

ROWS_AT_ONCE = 64
HUB_SIZES = {"korexyz/celeba-hq-256x256": "about 2.8 GB"}


def list_parquet(
    path: str | Path,
    *,
    classes: Sequence[str],
    hub_id: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    train_split: str = "train",
    val_split: str | None = "validation",
    val_share: float = 0.1,
    seed: int = 0,
    num_train: int | None = None,
    num_val: int | None = None,
) -> Listing:
    """The images of parquet files.

    Args:
        path: folder that is searched for *.parquet, or one such file.
        classes: names; must be those of the files, in any order, where the files name theirs. Labels that are plain
            numbers are positions in `classes`.
        hub_id, revision: a data set of the hub, fetched into `path` if there is no parquet file.
        image_column, label_column: names of columns.
        train_split, val_split: names of splits; None for the latter takes `val_share` of each class of the former.
        seed: of the images' order in the arrays, and of a split made here.
        num_train, num_val: only so many images of a split, the first ones in that order; None: all.

    Raises:
        DataError: files are missing or damaged, or a label is no class.
        ConfigError: a column, split or class that the files do not have.
    """
    path = Path(path)
    by_split = _require(path, [train_split] + ([val_split] if val_split else []), hub_id, revision)
    for key, name in (("train_split", train_split), ("val_split", val_split)):
        if name is not None and name not in by_split:
            raise ConfigError(
                f"dataset.{key}: no parquet file of the split {name!r} in {path}; found: {', '.join(sorted(by_split))}"
                + ("; null splits val_share off the training images" if key == "val_split" else "")
            )
    tables = {name: _Table(by_split[name], image_column, label_column) for name in {train_split, val_split} - {None}}
    notes: list[str] = []
    labels = {name: table.labels(classes, notes) for name, table in tables.items()}

    def order(name: str) -> NDArray[np.int64]:
        return mixed_order((f"{name}/{row}" for row in range(len(labels[name]))), seed)

    train, val = (train_split, order(train_split)), None
    if val_split is None:
        rows = train[1]
        chosen = split_off(labels[train_split][rows], val_share)
        train, val = (train_split, rows[~chosen]), (train_split, rows[chosen])
    else:
        val = (val_split, order(val_split))
    splits = {
        name: tables[table].split(rows[:limit], labels[table])
        for name, (table, rows), limit in (("train", train, num_train), ("val", val, num_val))
    }
    source = f"parquet files of {hub_id}" if hub_id else f"parquet files in {path.name}"
    lines = [file_line(file, file.name) for table in tables.values() for file in table.files]
    return Listing(path, splits, source, sorted(lines), list(dict.fromkeys(notes)))


def split_name(file: Path, path: Path) -> str:
    """The split that a file's name starts with; where it starts with a number, the folder's name, or train."""
    word = re.match(r"[A-Za-z_]*[A-Za-z]", file.stem)
    if word is not None and word[0] != "part":
        return word[0]
    return file.parent.name if file not in (path, path / file.name) else "train"


def _by_split(path: Path) -> dict[str, list[Path]]:
    """The parquet files below a folder, hidden ones aside, sorted."""
    found: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            found.setdefault(split_name(file, path), []).append(file)
    return found


def _missing_shard(files: Sequence[Path]) -> str | None:
    """A file that train-00000-of-00006.parquet and its like say there should be."""
    names = {file.name for file in files}
    for name in sorted(names):
        if match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(.*)\.parquet", name):
            start, count, end = match[1], int(match[2]), match[3]
            shards = [re.escape(f"{start}-{i:05}-of-{count:05}") for i in range(count)]
            for shard in shards:  # some writers add a checksum to each name
                if not any(re.match(shard, other) for other in names):
                    return re.sub(r"\\", "", shard) + ("" if end else ".parquet")
    return None


def _require(path: Path, wanted: Sequence[str], hub_id: str | None, revision: str | None) -> dict[str, list[Path]]:
    """The files of each split; fetched from the hub where files are missing.

    Raises DataError in one line that says what to get, where from and where to.
    """
    found = _by_split(path)
    complete = all(found.get(name) and not _missing_shard(found[name]) for name in wanted)
    reason = "dataset.hub_id is null"
    if not complete and hub_id is not None:
        made = not path.exists()
        lock = path.with_name(f".{path.name}.lock")
        with exclusive(lock, f"{path}: another process is downloading into this folder; wait until it ends"):
            reason = _download(path, hub_id, revision) or "the hub's data set has no such parquet files"
        found = _by_split(path)
        if made and not found:
            shutil.rmtree(path, ignore_errors=True)
    missing = next(filter(None, (_missing_shard(found.get(name, [])) for name in wanted)), None)
    if missing or not found:
        what = f"{missing} is missing: download it" if missing else "no parquet files there: download *.parquet"
        if hub_id is not None:
            size = HUB_SIZES.get(hub_id, "its page says how large")
            what += f" from https://huggingface.co/datasets/{hub_id} ({size} in all)"
        raise DataError(f"{path}: {what} into {path.resolve()}; not fetched here: {reason}")
    return found


def _download(path: Path, hub_id: str, revision: str | None) -> str:
    """Fetch the parquet files of a hub's data set; returns why that did not work, or an empty text.

    What was fetched before is kept: the hub's client goes on with it.
    """
    from huggingface_hub import snapshot_download

    print(f"{path}: fetching {hub_id} from the hub ({HUB_SIZES.get(hub_id, 'of unknown size')})", flush=True)
    try:
        snapshot_download(
            hub_id, repo_type="dataset", revision=revision, local_dir=path, allow_patterns=["*.parquet", "**/*.parquet"]
        )
    except Exception as error:  # the hub's own kinds, httpx's, OSError
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


class _Table:
    """The parquet files of one split, as one table of images."""

    def __init__(self, files: Sequence[Path], image_column: str, label_column: str) -> None:
        import pyarrow.parquet

        self.files, self.image_column, self.label_column = files, image_column, label_column
        self.first_rows = [0]
        self.class_names: list[str] | None = None
        self._stream: Iterator[Encoded] | None = None
        self._next_row = 0  # of the stream
        for file in files:
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    schema, rows = opened.schema_arrow, opened.metadata.num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(file, error) from None
            for key, column in (("image_column", image_column), ("label_column", label_column)):
                if column not in schema.names:
                    raise ConfigError(
                        f"dataset.{key}: {file} has no column {column!r}; it has: {', '.join(schema.names)}"
                    )
            names = _class_names(schema.metadata, label_column)
            if len(self.first_rows) > 1 and names != self.class_names:
                raise DataError(f"{file}: names the classes {names}, {files[0].name} {self.class_names}")
            self.class_names = names
            self.first_rows.append(self.first_rows[-1] + rows)

    def labels(self, classes: Sequence[str], notes: list[str]) -> NDArray[np.int64]:
        """(N,) positions in `classes`; adds to the notes where the files count them in another order."""
        import pyarrow.parquet

        values: list[Any] = []
        for file in self.files:
            try:
                values += pyarrow.parquet.read_table(file, columns=[self.label_column]).column(0).to_pylist()
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(file, error) from None
        names = self.class_names
        if names is not None and set(names) != set(classes):
            raise ConfigError(
                f"dataset.classes: {', '.join(classes)}, but {self.files[0]} names its classes {', '.join(names)};"
                " use these names"
            )
        if names is not None and list(names) != list(classes):
            notes.append(
                f"dataset.classes is in another order than the files' ({', '.join(names)});"
                " labels were changed to positions in dataset.classes"
            )
        number = {i: classes.index(name) for i, name in enumerate(names or classes)}
        number |= {name: i for i, name in enumerate(classes)}  # a column of names
        found = [number.get(value) if isinstance(value, int | float | str) else None for value in values]
        if None in found:
            row = found.index(None)
            raise DataError(
                f"{self._name(row)}: the label {values[row]!r} is no class; allowed: 0 .. {len(classes) - 1}"
                f" ({', '.join(names or classes)}) or these names"
            )
        return np.array(found, np.int64)

    def split(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> Split:
        """Some rows, `rows[i]` for position i of the arrays; read as they stand in the files."""
        places = np.argsort(rows)
        stored = rows[places]
        table = _Table(self.files, self.image_column, self.label_column)  # each split goes through the files by itself
        return Split(
            labels[stored], places, lambda i: self._name(int(stored[i])), lambda a, b: table._read(stored[a:b])
        )

    def _name(self, row: int) -> str:
        file = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.files[file]}, row {row - self.first_rows[file]}"

    def _read(self, rows: NDArray[np.int64]) -> list[Encoded]:
        """Images of rising rows."""
        found = []
        for row in rows.tolist():
            if self._stream is None or not self._next_row <= row < self._next_row + 10 * ROWS_AT_ONCE:
                self._stream, self._next_row = self._images_from(row), row
            found.append(next(itertools.islice(self._stream, row - self._next_row, None)))
            self._next_row = row + 1
        return found

    def _images_from(self, row: int) -> Iterator[Encoded]:
        """Images of this and all later rows, with few of them in memory."""
        import pyarrow.parquet

        first = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        skip = row - self.first_rows[first]
        for file in self.files[first:]:
            try:
                with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as opened:
                    sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
                    group = 0
                    while group < len(sizes) and skip >= sizes[group]:
                        skip, group = skip - sizes[group], group + 1
                    batches = opened.iter_batches(
                        ROWS_AT_ONCE, row_groups=list(range(group, len(sizes))), columns=[self.image_column]
                    )
                    cells = (cell for batch in batches for cell in batch.column(0))
                    for cell in itertools.islice(cells, skip, None):
                        yield _encoded(cell.as_py(), file.parent)
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(file, error) from None
            skip = 0


def _encoded(cell: Any, folder: Path) -> Encoded:
    """The image of a cell: its bytes, or the file that it names."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return folder / cell["path"]
        cell = cell.get("bytes")
    return Bytes(cell if isinstance(cell, bytes) else b"")


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The ClassLabel's names of a column, where the schema's metadata has them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _damaged(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{file}: is cut off or no parquet file ({reason}); delete it and get it anew")
