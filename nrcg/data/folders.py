"""One's own images: a folder per class, with or without train/ and val/ above, or one folder and a CSV of labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nrcg.data.sources import Listing, file_line, file_split, mixed_order, split_off
from nrcg.errors import ConfigError, DataError

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".ico", ".pcx"),
)
"""File names that end so, in small or capital letters, are taken for images."""
VAL_NAMES = ("val", "valid", "validation")


def list_folders(
    path: str | Path,
    *,
    classes: Sequence[str],
    val_share: float,
    seed: int,
    num_train: int | None = None,
    num_val: int | None = None,
) -> Listing:
    """The images below path/<class>, or below path/train/<class> and path/val/<class>.

    Files that are no images by their names are left out, with a note. Images stand in the arrays in an order drawn by
    the seed. Without train/ and val/, `val_share` of each class validates, chosen by seed and file names.

    Args:
        path: folder.
        classes: names of the folders, in the order of the labels.
        val_share, seed: of the split.
        num_train, num_val: only the first images of a split, in that order; None: all.

    Raises:
        DataError: no such folder; a folder that is no class, or a class without one.
    """
    path = _folder(path)
    held = {entry.name for entry in path.iterdir() if entry.is_dir()}
    val_names = [name for name in VAL_NAMES if name in held]
    if "train" in held and "train" not in classes:
        if len(val_names) != 1:
            words = "both " + " and ".join(val_names) if val_names else f"neither of {', '.join(VAL_NAMES)}"
            raise DataError(f"{path}: has train/, but {words}; one of them must stand beside it")
        roots = {"train": path / "train", "val": path / val_names[0]}
    else:
        roots = {"": path}
    found: dict[str, list[tuple[str, int]]] = {}
    others: list[str] = []
    for split, root in roots.items():
        found[split] = []
        _check_folders(root, classes)
        for label, name in enumerate(classes):
            images, rest = image_names(root / name, path)
            found[split] += [(image, label) for image in images]
            others += rest
    return _listing(path, found, val_share, seed, num_train, num_val, _ignored(others, "files that are no images"))


def list_labelled(
    path: str | Path,
    *,
    labels: str,
    classes: Sequence[str],
    image_column: str,
    label_column: str,
    split_column: str | None,
    image_suffix: str,
    val_share: float,
    seed: int,
    num_train: int | None = None,
    num_val: int | None = None,
) -> Listing:
    """The images that a CSV file lists. Images that it does not list are left out, with a note.

    Args:
        path: folder that the file names are relative to.
        labels: the CSV file, relative to `path`: a header, then one image a line, separated by comma, semicolon or tab.
        classes: names; a label is one of them, or if none of the file's labels is, a position in them.
        image_column, label_column, split_column: names of columns; a split is train or val (or valid, validation).
        image_suffix: what is added to the file names.
        val_share, seed, num_train, num_val: see `list_folders`.

    Raises:
        ConfigError: a column that the CSV does not have.
        DataError: no such file; a label that is no class; an image that is not there, or is listed twice.
    """
    path = _folder(path)
    table = path / labels
    rows = _read_table(table, [image_column, label_column, *([split_column] if split_column else [])])
    by_name = {name: i for i, name in enumerate(classes)}
    if rows and not any(row[label_column] in by_name for _, row in rows):
        by_name = {str(i): i for i in range(len(classes))}
    found: dict[str, list[tuple[str, int]]] = {"train": [], "val": []} if split_column else {"": []}
    seen: set[str] = set()
    missing = []
    for number, row in rows:
        name, label = row[image_column] + image_suffix, row[label_column]
        if label not in by_name:
            raise DataError(
                f"{table}, line {number}: the label {label!r} is no class; allowed: {', '.join(classes)},"
                f" or throughout 0 .. {len(classes) - 1}"
            )
        if name in seen:
            raise DataError(f"{table}, line {number}: {name} is listed twice")
        seen.add(name)
        if not (path / name).is_file():
            missing.append(name)
        split = ""
        if split_column:
            split = "val" if row[split_column] in VAL_NAMES else row[split_column]
            if split == "test":
                continue
            if split not in found:
                raise DataError(f"{table}, line {number}: the split {split!r} is none of train, val, test")
        found[split].append((name, by_name[label]))
    if missing:
        raise DataError(
            f"{table}: lists {len(rows):,} images, {len(missing):,} of them are not in {path}, such as {missing[0]}"
        )
    images, _ = image_names(path, path)
    notes = _ignored([name for name in images if name not in seen], f"images that {table.name} does not list")
    listing = _listing(path, found, val_share, seed, num_train, num_val, notes)
    listing.files.append(file_line(table, table.name))
    return listing


def _listing(
    path: Path,
    found: dict[str, list[tuple[str, int]]],
    val_share: float,
    seed: int,
    num_train: int | None,
    num_val: int | None,
    notes: list[str],
) -> Listing:
    """Mix the images and, where they have no split yet (""), split them."""
    for split, images in found.items():
        found[split] = [images[i] for i in mixed_order((name for name, _ in images), seed)]
    if "" in found:
        images = found.pop("")
        val = split_off(np.array([label for _, label in images], np.int64), val_share)
        for split, wanted in (("train", False), ("val", True)):
            found[split] = [image for image, chosen in zip(images, val, strict=True) if chosen == wanted]
    splits, lines = {}, []
    for split, limit in (("train", num_train), ("val", num_val)):
        names = [name for name, _ in found[split]][:limit]
        paths = [path / name for name in names]
        splits[split] = file_split(paths, names, [label for _, label in found[split]][:limit])
        lines += [file_line(file, name) for file, name in zip(paths, names, strict=True)]
    return Listing(path, splits, f"images in {path.name}", sorted(lines), notes)


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; dataset.path must name the folder of the images ({path.resolve()})")
    return path


def _check_folders(root: Path, classes: Sequence[str]) -> None:
    held = {entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name)}
    missing, surplus = [name for name in classes if name not in held], sorted(held - set(classes))
    if missing or surplus:
        words = [f"has no folder for the class {', '.join(missing)}"] if missing else []
        words += [f"has folders that are no class: {', '.join(surplus[:10])}"] if surplus else []
        raise DataError(f"{root}: {' and '.join(words)}; dataset.classes: {', '.join(classes)}")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def image_names(folder: Path, path: Path) -> tuple[list[str], list[str]]:
    """Files below a folder, as POSIX names relative to `path`: images, and others. Links are followed, each folder
    once."""
    images, others = [], []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in folders.copy():
            real = os.path.realpath(Path(place) / name)
            if real in seen:
                folders.remove(name)
            seen.add(real)
        for name in files:
            if not _hidden(name):
                relative = (Path(place) / name).relative_to(path).as_posix()
                (images if name.lower().endswith(ENDINGS) else others).append(relative)
    return images, others


def _ignored(names: list[str], what: str) -> list[str]:
    return [f"left out {len(names):,} {what}, such as {min(names)}"] if names else []


def _read_table(path: Path, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and cells of a CSV file, with the columns asked for."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=separator), [])
            rows = csv.reader(file, delimiter=separator)
            cells = [(rows.line_num + 1, [cell.strip() for cell in row]) for row in rows if any(row)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; dataset.labels names it, relative to dataset.path") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    names = [name.strip() for name in names]
    for column in columns:
        if column not in names:
            raise ConfigError(
                f"dataset: {path} has no column {column!r}; it has: {', '.join(names)};"
                " set image_column, label_column or split_column"
            )
    for number, row in cells:
        if len(row) != len(names):
            raise DataError(f"{path}, line {number}: {len(row)} cells, the header has {len(names)}")
    return [(number, dict(zip(names, row, strict=True))) for number, row in cells]
