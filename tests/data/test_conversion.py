"""The conversion of raw images to arrays: what it writes, and what it leaves when files are bad or it is killed."""

import csv
import json
import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_images import encoded, write_celeba, write_celebahq, write_csv, write_folders, write_parquet

from nrcg import cli, config
from nrcg.data import arrays, conversion
from nrcg.data.conversion import convert
from nrcg.data.folders import list_folders
from nrcg.data.parquet import list_parquet
from nrcg.data.pixels import decode
from nrcg.errors import DataError
from nrcg.files import remove_leftovers

ROOT = Path(__file__).parents[2]
CLASSES = ["cats", "dogs"]


def listing(raw: Path, **changes: object):
    return list_folders(raw, **{"classes": CLASSES, "val_share": 0.2, "seed": 0, **changes})


def run(folder: Path, found, **changes: object) -> dict:
    arguments = {
        "name": "mine",
        "classes": CLASSES,
        "image_size": 16,
        "preprocessing": "squash",
        "max_unreadable": 0.0,
        "settings": {"seed": 0},
        "workers": 2,
    }
    return convert(folder, found, **arguments | changes)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


WHOLE = [
    "dataset.json",
    *("train/images.npy", "train/labels.npy", "train/mean.npy"),
    *("val/images.npy", "val/labels.npy"),
]


@pytest.fixture
def raw(tmp_path) -> Path:
    write_folders(tmp_path / "raw", {"cats": 30, "dogs": 20})
    return tmp_path / "raw"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(conversion, "PIECE_BYTES", 4 * 3 * 16 * 16)  # 4 images of 16 pixels


@pytest.mark.parametrize("preprocessing", ["squash", "center_crop"])
def test_the_arrays_hold_the_images_and_the_manifest_tells_of_them(raw, tmp_path, small_pieces, preprocessing):
    found = listing(raw)
    seen = []
    manifest = run(tmp_path / "out", found, preprocessing=preprocessing, on_images=seen.append)
    assert files(tmp_path / "out") == WHOLE
    arrays.verify(tmp_path / "out")
    for split, images in found.splits.items():
        pixels, labels = arrays.open_split(tmp_path / "out", split)
        assert len(labels) == len(images.labels)
        for i, place in enumerate(images.places):
            data = (raw / images.name(i)).read_bytes()
            np.testing.assert_array_equal(pixels[place], decode(data, size=16, preprocessing=preprocessing))
            assert images.name(i).startswith(CLASSES[labels[place]])
    train, _ = arrays.open_split(tmp_path / "out", "train")
    expected = arrays.to_unit(train).double().mean(0)  # float32 holds values of about 1 to 6e-8
    np.testing.assert_allclose(arrays.mean_image(tmp_path / "out"), expected, atol=2e-7)
    assert manifest["splits"]["train"]["class_counts"] == {"cats": 24, "dogs": 16}
    assert manifest["splits"]["val"]["class_counts"] == {"cats": 6, "dogs": 4}
    assert (manifest["name"], manifest["source"], manifest["image_size"]) == ("mine", "images in raw", 16)
    assert manifest["generation"]["preprocessing"] == preprocessing
    assert manifest["generation"]["unreadable"] == {"count": 0, "files": []}
    assert seen == sorted(seen) and seen[-1] == 50 and len(seen) > 10


def test_the_data_set_does_not_depend_on_the_workers(raw, tmp_path, small_pieces):
    assert run(tmp_path / "a", listing(raw), workers=1) == run(tmp_path / "b", listing(raw), workers=5)


def test_parquet_rows_stand_where_their_order_says(tmp_path, small_pieces):
    images, labels = write_celebahq(tmp_path / "raw", 31, 9, size=16)
    found = list_parquet(tmp_path / "raw", classes=["female", "male"])
    run(tmp_path / "out", found, classes=["female", "male"])
    pixels, stored = arrays.open_split(tmp_path / "out", "train")
    expected = {
        decode(data, size=16, preprocessing="squash").tobytes(): label
        for data, label in zip(images, labels, strict=True)
    }
    assert [expected[image.tobytes()] for image in pixels] == stored.tolist()
    assert len({image.tobytes() for image in pixels}) == 31
    assert 0 < stored[:10].sum() < 10  # the files are sorted by class


# --- Bad files --------------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}[how])


def test_unreadable_files_are_left_out_counted_and_listed(raw, tmp_path, small_pieces):
    whole = run(tmp_path / "whole", listing(raw))
    found = listing(raw)
    bad = {
        found.splits["train"].name(0): "cut",
        found.splits["train"].name(21): "text",
        found.splits["val"].name(9): "empty",
    }
    for name, how in bad.items():
        spoil(raw / name, how)
    manifest = run(tmp_path / "out", listing(raw), max_unreadable=0.06)
    assert manifest["splits"]["train"]["num_images"] == 38 and manifest["splits"]["val"]["num_images"] == 9
    assert manifest["generation"]["unreadable"] == {
        "count": 3,
        "files": sorted(bad, key=lambda n: (n == found.splits["val"].name(9), n)),
    }
    with open(tmp_path / "out/unreadable.csv", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == set(bad)
    arrays.verify(tmp_path / "out")
    for split, gone in (("train", [0, 21]), ("val", [9])):
        before, after = (arrays.open_split(tmp_path / name, split) for name in ("whole", "out"))
        np.testing.assert_array_equal(np.delete(before[0], gone, 0), after[0])
        np.testing.assert_array_equal(np.delete(before[1], gone), after[1])
    train, _ = arrays.open_split(tmp_path / "out", "train")
    np.testing.assert_allclose(arrays.mean_image(tmp_path / "out"), arrays.to_unit(train).mean(0), atol=1e-6)
    assert whole["generation"]["images_sha256"] != manifest["generation"]["images_sha256"]


def test_too_many_unreadable_files_are_refused_in_one_line_and_leave_no_data_set(raw, tmp_path, small_pieces):
    for i in range(3):
        spoil(raw / f"cats/{i}.png", "cut")
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", listing(raw), max_unreadable=0.05)
    text = str(caught.value)
    assert text.startswith(f"{raw}: 3 of 50 images cannot be read, more than dataset.max_unreadable: 0.05 allows; such")
    assert "cats/" in text and "\n" not in text
    assert files(tmp_path / "out") == ["unreadable.csv"]
    assert len((tmp_path / "out/unreadable.csv").read_text().splitlines()) == 4


def test_a_hopeless_folder_is_given_up_early(tmp_path, monkeypatch, small_pieces):
    monkeypatch.setattr(conversion, "MORE_UNREADABLE", 5)
    write_folders(tmp_path / "raw", {"cats": 30, "dogs": 20})
    for path in (tmp_path / "raw").rglob("*.png"):
        spoil(path, "text")
    with pytest.raises(DataError, match="at least 8 of 50 images cannot be read"):
        run(tmp_path / "out", listing(tmp_path / "raw"))


@pytest.mark.parametrize(
    ("counts", "message"), [({"cats": 5, "dogs": 0}, "class 'dogs'"), ({"cats": 1, "dogs": 1}, "split val")]
)
def test_a_class_or_split_without_images_is_refused(tmp_path, counts, message):
    write_folders(tmp_path / "raw", counts)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", listing(tmp_path / "raw"))
    assert not (tmp_path / "out").exists()


# --- Stops, kills and second writers ----------------------------------------------------------------------------


class Stop(Exception):
    """What ends a process without being a mistake in the data."""


def stop_after(count: int):
    def on_images(done: int) -> None:
        if done >= count:
            raise Stop

    return on_images


def stopped(folder: Path, found, count: int = 20) -> None:
    with pytest.raises(Stop):
        run(folder, found, on_images=stop_after(count))
    assert "dataset.json" not in files(folder)


def test_a_stopped_conversion_leaves_nothing_and_is_made_anew(raw, tmp_path, small_pieces):
    expected = run(tmp_path / "at_once", listing(raw))
    stopped(tmp_path / "out", listing(raw))
    assert files(tmp_path / "out") == []
    assert run(tmp_path / "out", listing(raw)) == expected
    assert files(tmp_path / "out") == WHOLE


def test_two_writers_of_one_folder_are_told_apart(raw, tmp_path, small_pieces):
    busy, go_on = threading.Event(), threading.Event()

    def wait(done: int) -> None:
        busy.set()
        assert go_on.wait(60)

    first = threading.Thread(target=run, args=(tmp_path / "out", listing(raw)), kwargs={"on_images": wait})
    first.start()
    assert busy.wait(60)
    with pytest.raises(DataError, match="out: another process is writing this data set; wait until it ends"):
        run(tmp_path / "out", listing(raw))
    go_on.set()
    first.join()
    arrays.verify(tmp_path / "out")
    assert files(tmp_path / "out") == WHOLE


# --- By the command, from config.yaml ---------------------------------------------------------------------------


def write_config(folder: Path, **dataset: object) -> Path:
    raw = config.read_yaml(ROOT / "config.yaml")
    raw["experiments"] = {
        "mine": {"target": dataset["classes"][0], "dataset": {"name": "mine", "image_size": 16, **dataset}}
    }
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return path


def command(path: Path, out: Path) -> list[str]:
    return ["dataset", "--config", str(path), "--experiment", "mine", "--out", str(out), "--threads", "2"]


def by_celeba(raw: Path) -> dict:
    write_celeba(raw, 12, 6)
    return {"source": "celeba", "attribute": "Male", "classes": ["female", "male"]}


def by_huggingface(raw: Path) -> dict:
    write_celebahq(raw, 12, 6)
    return {"source": "huggingface", "classes": ["female", "male"]}


def by_folder(raw: Path) -> dict:
    write_folders(raw / "train", {"a": 6, "b": 6})
    write_folders(raw / "val", {"a": 3, "b": 3})
    return {"source": "folder", "classes": ["a", "b"]}


def by_csv(raw: Path) -> dict:
    write_folders(raw, {"all": 18})
    write_csv(raw / "y.csv", [["file", "y"], *([f"all/{i}.png", "ab"[i % 2]] for i in range(18))])
    columns = {"image_column": "file", "label_column": "y", "labels": "y.csv"}
    return {"source": "folder", "classes": ["a", "b"], "val_share": 1 / 3, **columns}


def test_copies_and_links_between_splits_and_classes_are_counted(tmp_path, capsys, small_pieces):
    """By hand: a copied and a linked validation image, one of them in the other class, and an unreadable pair."""
    raw = tmp_path / "raw"
    block = by_folder(raw)
    write_folders(raw / "val", {"a": 3, "b": 3}, first=100)  # others than those of training
    shutil.copy(raw / "train/a/0.png", raw / "val/a/copy.png")
    (raw / "val/b/link.png").symlink_to(raw / "train/a/1.png")
    (raw / "train/b/twin.png").write_bytes((raw / "train/b/2.png").read_bytes())
    for split in ("train", "val"):
        (raw / split / "a/empty.png").touch()
    path = write_config(tmp_path, path=str(raw), max_unreadable=0.2, **block)
    assert cli.main(command(path, tmp_path / "out")) == 0
    manifest = arrays.load_manifest(tmp_path / "out")
    assert manifest["generation"]["copies"] == {"val_in_train": 2, "in_two_classes": 1}
    said = capsys.readouterr().out
    assert "2 validation images are training images too" in said and "1 images stand in more than one class" in said


@pytest.mark.parametrize("write", [by_celeba, by_huggingface, by_folder, by_csv])
def test_each_source_becomes_a_data_set_by_its_block_in_the_config(tmp_path, capsys, write):
    block = write(tmp_path / "raw")
    path = write_config(tmp_path, path=str(tmp_path / "raw"), **block)
    assert cli.main(command(path, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == WHOLE
    arrays.verify(tmp_path / "out")
    manifest = arrays.load_manifest(tmp_path / "out")
    assert [manifest["splits"][split]["num_images"] for split in ("train", "val")] == [12, 6]
    assert "train: 12 images: " in capsys.readouterr().out


def broken_celeba(raw: Path) -> dict:
    block = by_celeba(raw)
    spoil(raw / "img_align_celeba/000003.jpg", "cut")
    return block


def broken_parquet(raw: Path) -> dict:
    block = by_huggingface(raw)
    write_parquet(raw / "data/validation-00000-of-00001.parquet", [encoded(Image.new("RGB", (9, 9))), None], [0, 1])
    return block


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            broken_celeba,
            "raw: 1 of 18 images cannot be read, more than dataset.max_unreadable: 0 allows; such as 000003.jpg",
        ),
        (broken_parquet, "validation-00000-of-00001.parquet, row 1 (empty)"),
        (
            lambda raw: {"source": "celeba", "attribute": "Male", "classes": ["f", "m"], "download": False},
            "CelebA is not",
        ),
        (lambda raw: {"source": "huggingface", "classes": ["f", "m"]}, "no parquet files there: download"),
        (lambda raw: {"source": "folder", "classes": ["f", "m"]}, "no such folder"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, write, message):
    path = write_config(tmp_path, path=str(tmp_path / "raw"), **write(tmp_path / "raw"))
    assert cli.main(command(path, tmp_path / "out")) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if message in line and line.startswith("nrcg: ")] == said[-1:]
    assert set(files(tmp_path / "out")) <= {"unreadable.csv"}


def test_a_killed_command_is_made_anew(tmp_path):
    """kill -9 within the conversion: nothing looks finished, and the next run's arrays are as if nothing had been."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_folders(raw, {"a": 60, "b": 60})
    slow = [encoded(Image.new("RGB", (600, 600), (i, 7, 9)), "BMP") for i in range(5)]
    for i, path in enumerate(sorted(raw.rglob("*.png"))):  # Pillow looks at the content; there is time to kill
        path.write_bytes(slow[i % 5])
    path = write_config(tmp_path, path=str(raw), source="folder", classes=["a", "b"], image_size=512)
    process = multiprocessing.get_context("fork").Process(target=cli.main, args=(command(path, out),))
    process.start()
    deadline = time.monotonic() + 60
    while not list(out.glob("train/.images.npy.*.tmp")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (out / "dataset.json").exists() and not (out / "train/images.npy").exists()
    remove_leftovers(out)  # as a run of the workflow does at its start
    assert files(out) == []
    assert cli.main(command(path, out)) == 0
    assert files(out) == WHOLE
    arrays.verify(out)
