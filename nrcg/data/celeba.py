"""CelebA as its authors hand it out: aligned images, a list of attributes and a list of official splits.

img_align_celeba/000001.jpg ...   178 x 218 pixels; or img_align_celeba.zip, which is read without unpacking it
list_attr_celeba.txt              number of images; 40 names; per image its name and 40 times 1 or -1
list_eval_partition.txt           per image its name and 0 (train), 1 (validation) or 2 (test, not used here)
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nrcg.data.sources import Encoded, Listing, file_line, file_split
from nrcg.errors import ConfigError, DataError
from nrcg.files import exclusive

IMAGES, ATTRIBUTES, PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
SIZES = {f"{IMAGES}.zip": "about 1.4 GB", ATTRIBUTES: "about 27 MB", PARTITION: "about 3 MB"}
HOMEPAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


# Below the folder given: as torchvision unpacks it, and as the authors' Google Drive has it.
PLACES = (".", "celeba", "Img", "Anno", "Eval")


@dataclass(frozen=True)
class _ZipMember:
    archive: zipfile.ZipFile  # may be read by several threads
    name: str

    def read_bytes(self) -> bytes:
        try:
            return self.archive.read(self.name)
        except zipfile.BadZipFile as error:
            raise OSError(str(error)) from error


def list_celeba(
    path: str | Path,
    *,
    attribute: str,
    num_train: int | None = None,
    num_val: int | None = None,
    download: bool = False,
) -> Listing:
    """CelebA's images with an attribute as label: 0 without it, 1 with it.

    Args:
        path: folder of the files above.
        attribute: one of the 40, such as Male.
        num_train, num_val: only the first images of a split; None: all.
        download: fetch missing files by torchvision's download from Google Drive, which needs gdown.

    Raises:
        ConfigError: no such attribute.
        DataError: a file is missing, damaged, or does not fit the others.
    """
    path = Path(path)
    _require(path, download)
    attributes, partition = _find(path, ATTRIBUTES), _find(path, PARTITION)
    assert attributes is not None and partition is not None
    labels = _read_attribute(attributes, attribute)
    parts = _read_partition(partition)
    for name in labels.keys() ^ parts.keys():
        having, lacking = (attributes, partition) if name in labels else (partition, attributes)
        raise DataError(
            f"{lacking}: has no line for {name}, which {having.name} lists;"
            f" {len(labels):,} images in {ATTRIBUTES}, {len(parts):,} in {PARTITION}; get both anew from {HOMEPAGE}"
        )
    files, where, lines = _find_images(path, sorted(labels))
    splits = {}
    for split, number, limit in (("train", 0, num_train), ("val", 1, num_val)):
        names = [name for name in sorted(labels) if parts[name] == number][:limit]
        splits[split] = file_split([files[name] for name in names], names, [labels[name] for name in names])
    lines += [file_line(file, file.name) for file in (attributes, partition)]
    return Listing(path, splits, f"CelebA, {where}, labelled by {attribute}", lines)


def _find(path: Path, name: str) -> Path | None:
    return next((path / place / name for place in PLACES if (path / place / name).exists()), None)


def _missing(path: Path) -> list[str]:
    images = _find(path, IMAGES) or _find(path, f"{IMAGES}.zip")
    lists = [name for name in (ATTRIBUTES, PARTITION) if _find(path, name) is None]
    return ([] if images else [f"{IMAGES}.zip"]) + lists


def _require(path: Path, download: bool) -> None:
    """Raises DataError in one line that says what to get, where from and where to, if it cannot be fetched."""
    missing = _missing(path)
    if not missing:
        return
    reason = "dataset.download is false"
    if download:
        lock = path.with_name(f".{path.name}.lock")
        with exclusive(lock, f"{path}: another process is downloading into this folder; wait until it ends"):
            reason = _download(path, missing)
    missing = _missing(path)
    if missing:
        files = ", ".join(f"{name} ({SIZES[name]})" for name in missing)
        raise DataError(
            f"{path}: CelebA is not there: download {files} from {HOMEPAGE} (Google Drive, folders Img, Anno and Eval)"
            f" into {path.resolve()}; not fetched here: {reason}"
        )


def _download(path: Path, missing: list[str]) -> str:
    """Fetch files by torchvision, which checks their MD5; returns why that did not work, or an empty text."""
    try:
        import gdown  # noqa: F401  (torchvision's download needs it)
    except ImportError:
        return "torchvision's download needs gdown (pip install gdown)"
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import download_file_from_google_drive

    for file_id, md5, name in CelebA.file_list:
        if name in missing:
            print(f"{path / name}: downloading {SIZES[name]} from Google Drive", flush=True)
            try:
                download_file_from_google_drive(file_id, path, name, md5)
            except Exception as error:  # gdown's own kinds, requests', and torchvision's RuntimeError
                (path / name).unlink(missing_ok=True)  # not what the MD5 says
                return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _find_images(path: Path, names: list[str]) -> tuple[dict[str, Encoded], str, list[str]]:
    """Every listed image, words for where they are, and the lines that tell their state."""
    folder, archive = _find(path, IMAGES), _find(path, f"{IMAGES}.zip")
    if folder is not None and (folder / IMAGES).is_dir():  # unpacked into a folder of the same name
        folder = folder / IMAGES
    if folder is not None:
        with os.scandir(folder) as entries:
            found = {entry.name for entry in entries if _is_image(entry.name)}
        if archive is None or found == set(names):
            _compare(folder, found, names)
            lines = [file_line(folder / name, name) for name in names]
            return {name: folder / name for name in names}, f"{folder.name}/", lines
    assert archive is not None
    try:
        members = zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{archive}: is cut off or no zip file ({error}); delete it and get it anew from {HOMEPAGE}"
        ) from None
    inside = {name.rpartition("/")[2]: name for name in members.namelist()}
    inside = {name: member for name, member in inside.items() if _is_image(name)}
    _compare(archive, set(inside), names)
    return {name: _ZipMember(members, inside[name]) for name in names}, archive.name, [file_line(archive, archive.name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(".jpg") and not name.startswith(".")


def _compare(place: Path, found: set[str], names: list[str]) -> None:
    missing, surplus = sorted(set(names) - found), sorted(found - set(names))
    if missing or surplus:
        words = [f"{len(missing):,} of them are missing, such as {missing[0]}"] if missing else []
        words += [f"{len(surplus):,} are not listed, such as {surplus[0]}"] if surplus else []
        raise DataError(
            f"{place}: holds {len(found):,} images, {ATTRIBUTES} lists {len(names):,}: {'; '.join(words)};"
            f" unpack {IMAGES}.zip anew, or put it in the folder's place"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); get it anew from {HOMEPAGE}") from None


def _read_attribute(path: Path, attribute: str) -> dict[str, int]:
    """Image name -> 0 or 1."""
    lines = _lines(path)
    if len(lines) < 2 or not lines[0].strip().isdecimal():
        raise DataError(f"{path}, line 1: should be the number of images; get the file anew from {HOMEPAGE}")
    count, columns = int(lines[0]), lines[1].split()
    if attribute not in columns:
        raise ConfigError(f"dataset.attribute: {attribute!r} is no attribute of {path}; allowed: {', '.join(columns)}")
    column = columns.index(attribute) + 1
    labels: dict[str, int] = {}
    for number, line in enumerate(lines[2:], start=3):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != len(columns) + 1:
            raise DataError(
                f"{path}, line {number}: {len(cells) - 1} values for {len(columns)} attributes; the file is cut off or"
                f" damaged, get it anew from {HOMEPAGE}"
            )
        if cells[column] not in ("1", "-1"):
            raise DataError(f"{path}, line {number}: {attribute} is {cells[column]!r}; allowed: 1 and -1")
        if cells[0] in labels:
            raise DataError(f"{path}, line {number}: {cells[0]} is listed twice")
        labels[cells[0]] = int(cells[column] == "1")
    if len(labels) != count:
        raise DataError(
            f"{path}: lists {len(labels):,} images, its first line says {count:,}; the file is cut off or damaged,"
            f" get it anew from {HOMEPAGE}"
        )
    return labels


def _read_partition(path: Path) -> dict[str, int]:
    """Image name -> 0, 1 or 2."""
    parts: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2 or cells[1] not in ("0", "1", "2"):
            raise DataError(f"{path}, line {number}: {line.strip()!r}; should be an image and 0, 1 or 2")
        if cells[0] in parts:
            raise DataError(f"{path}, line {number}: {cells[0]} is listed twice")
        parts[cells[0]] = int(cells[1])
    return parts
