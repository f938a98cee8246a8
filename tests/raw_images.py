"""Small data sets in exactly the formats in which the large ones are handed out."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# The second line of list_attr_celeba.txt.
CELEBA_HEADER = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young "
)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours and a disc, so that JPEG changes little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    colours = rng.uniform(30, 225, (3, 3))
    pixels = (
        colours[0] + x[..., None] * (colours[1] - colours[0]) * 0.5 + y[..., None] * (colours[2] - colours[0]) * 0.5
    )
    cx, cy = rng.uniform(0.3, 0.6, 2)
    pixels[(x - cx) ** 2 + (y - cy) ** 2 < 0.02] = rng.uniform(0, 255, 3)
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def write_celeba(folder: Path, num_train: int, num_val: int, num_test: int = 2, *, as_zip: bool = False) -> np.ndarray:
    """img_align_celeba with its two lists; every third image is Male. Returns who is, in the order of the numbers."""
    count = num_train + num_val + num_test
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    male = np.arange(count) % 3 == 1
    folder.mkdir(parents=True)
    if as_zip:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            archive.mkdir("img_align_celeba")
            for i, name in enumerate(names):
                archive.writestr(f"img_align_celeba/{name}", encoded(picture(i, 178, 218), "JPEG", quality=95))
    else:
        (folder / "img_align_celeba").mkdir()
        for i, name in enumerate(names):
            picture(i, 178, 218).save(folder / "img_align_celeba" / name, quality=95)
    rng = np.random.default_rng(0)
    values = np.where(rng.random((count, 40)) < 0.5, 1, -1)
    values[:, CELEBA_HEADER.split().index("Male")] = np.where(male, 1, -1)
    rows = [f"{name} {' '.join(f'{value:2d}' for value in row)}" for name, row in zip(names, values, strict=True)]
    lines = [str(count), CELEBA_HEADER, *rows]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = [0] * num_train + [1] * num_val + [2] * num_test
    lines = [f"{name} {part}" for name, part in zip(names, parts, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return male


def write_parquet(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    *,
    names: Sequence[str] | None = ("female", "male"),
    row_group_size: int = 5,
    columns: tuple[str, str] = ("image", "label"),
) -> None:
    """A file as `datasets` uploads it: image = struct{bytes, path}, the features in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array(
        [{"bytes": data, "path": None} for data in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    table = pa.table({columns[0]: image, columns[1]: pa.array(labels)})
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"info": {"features": {columns[0]: {"_type": "Image"}, columns[1]: label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)


def write_celebahq(folder: Path, num_train: int, num_val: int, size: int = 40) -> tuple[list[bytes], list[int]]:
    """Two training shards and one of validation, sorted by class; returns images and labels in this order."""
    images = [encoded(picture(i, size, size)) for i in range(num_train + num_val)]
    train = sorted(i % 2 for i in range(num_train))
    labels = train + [i % 2 for i in range(num_val)]
    half = num_train // 2
    for name, start, stop in (
        ("train-00000-of-00002", 0, half),
        ("train-00001-of-00002", half, num_train),
        ("validation-00000-of-00001", num_train, num_train + num_val),
    ):
        write_parquet(folder / f"data/{name}.parquet", images[start:stop], labels[start:stop])
    return images, labels


def write_folders(folder: Path, counts: dict[str, int], *, first: int = 0) -> None:
    """A folder per class of PNGs of odd sizes."""
    i = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            picture(i, 20 + i % 7, 33 - i % 5).save(folder / name / f"{n}.png")
            i += 1


def write_csv(file: Path, rows: Sequence[Sequence[object]]) -> None:
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows(rows)
