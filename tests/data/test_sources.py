"""The readers of CelebA, parquet files and folders, on small data in the formats of the large ones."""

import itertools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from raw_images import (
    CELEBA_HEADER,
    encoded,
    picture,
    write_celeba,
    write_celebahq,
    write_csv,
    write_folders,
    write_parquet,
)

from nrcg.data import celeba, parquet
from nrcg.data.celeba import list_celeba
from nrcg.data.folders import list_folders, list_labelled
from nrcg.data.parquet import list_parquet
from nrcg.data.sources import mixed_order, split_off
from nrcg.errors import NrcgError


def contents(listing, split: str) -> dict[str, tuple[bytes, int]]:
    """Name -> file and label, read in three pieces."""
    images = listing.splits[split]
    count = len(images.labels)
    bounds = [0, count // 3, count // 2, count]
    files = [file.read_bytes() for a, b in itertools.pairwise(bounds) for file in images.read(a, b)]
    assert sorted(images.places.tolist()) == list(range(count))
    return {images.name(i): (files[i], int(images.labels[i])) for i in range(count)}


def refused(call, *arguments, **keywords) -> str:
    with pytest.raises(NrcgError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- CelebA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_celeba_has_its_official_splits_and_labels(tmp_path, as_zip):
    male = write_celeba(tmp_path / "raw", 9, 4, 3, as_zip=as_zip)
    listing = list_celeba(tmp_path / "raw", attribute="Male")
    for split, numbers in (("train", range(9)), ("val", range(9, 13))):
        found = contents(listing, split)
        assert {name: label for name, (_, label) in found.items()} == {f"{i + 1:06d}.jpg": male[i] for i in numbers}
        for i in numbers:
            assert found[f"{i + 1:06d}.jpg"][0] == encoded(picture(i, 178, 218), "JPEG", quality=95)


def test_celebas_attributes_are_its_columns(tmp_path):
    write_celeba(tmp_path / "raw", 20, 5)
    rows = [line.split() for line in (tmp_path / "raw/list_attr_celeba.txt").read_text().splitlines()[2:]]
    for attribute in ("5_o_Clock_Shadow", "Smiling", "Young"):
        column = CELEBA_HEADER.split().index(attribute) + 1
        labels = list_celeba(tmp_path / "raw", attribute=attribute).splits["train"].labels
        assert labels.tolist() == [int(row[column] == "1") for row in rows[:20]]


def test_celebas_first_images_alone(tmp_path):
    write_celeba(tmp_path / "raw", 9, 4)
    listing = list_celeba(tmp_path / "raw", attribute="Male", num_train=3, num_val=100)
    assert list(contents(listing, "train")) == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert len(contents(listing, "val")) == 4


@pytest.mark.parametrize("layout", ["torchvision", "drive", "nested", "half unpacked"])
def test_celeba_is_found_as_others_lay_it_out(tmp_path, layout):
    raw = tmp_path / "raw"
    as_zip = layout in ("drive", "half unpacked")
    write_celeba(raw / "celeba" if layout == "torchvision" else raw, 6, 3, as_zip=as_zip)
    if layout == "drive":
        for folder, name in (("Img", "img_align_celeba.zip"), ("Anno", celeba.ATTRIBUTES), ("Eval", celeba.PARTITION)):
            (raw / folder).mkdir()
            (raw / name).rename(raw / folder / name)
    elif layout == "nested":
        (raw / "img_align_celeba").rename(raw / "inner")
        (raw / "img_align_celeba").mkdir()
        (raw / "inner").rename(raw / "img_align_celeba/img_align_celeba")
    elif layout == "half unpacked":
        with zipfile.ZipFile(raw / "img_align_celeba.zip") as archive:
            archive.extract("img_align_celeba/000001.jpg", raw)
    assert len(contents(list_celeba(raw, attribute="Male"), "train")) == 6


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CELEBA_DAMAGE = {
    "no attribute list": (
        lambda raw: (raw / celeba.ATTRIBUTES).unlink(),
        "download list_attr_celeba.txt (about 27 MB)",
    ),
    "no partition": (
        lambda raw: (raw / celeba.PARTITION).unlink(),
        "download list_eval_partition.txt (about 3 MB)",
    ),
    "no images": (
        lambda raw: shutil.rmtree(raw / "img_align_celeba"),
        "download img_align_celeba.zip (about 1.4 GB)",
    ),
    "nothing": (lambda raw: shutil.rmtree(raw), "download img_align_celeba.zip (about 1.4 GB), list_attr_celeba.txt"),
    "count": (lambda raw: spoil(raw / celeba.ATTRIBUTES, "11\n", "12\n"), "lists 11 images, its first line says 12"),
    "list cut": (lambda raw: spoil(raw / celeba.ATTRIBUTES, "\n000011.jpg", ""), "line 12: "),
    "value": (lambda raw: spoil(raw / celeba.ATTRIBUTES, "-1", " 3"), "allowed: 1 and -1"),
    "twice": (
        lambda raw: spoil(raw / celeba.ATTRIBUTES, "000002.jpg", "000001.jpg"),
        "line 4: 000001.jpg is listed",
    ),
    "part": (lambda raw: spoil(raw / celeba.PARTITION, "000003.jpg 0", "000003.jpg 3"), "line 3: '000003.jpg 3'"),
    "part lost": (
        lambda raw: spoil(raw / celeba.PARTITION, "000003.jpg 0\n", ""),
        "has no line for 000003.jpg, ",
    ),
    "an image lost": (
        lambda raw: (raw / "img_align_celeba/000005.jpg").unlink(),
        "holds 10 images, list_attr_celeba.txt lists 11: 1 of them are missing, such as 000005.jpg",
    ),
    "an image more": (
        lambda raw: shutil.copy(raw / "img_align_celeba/000005.jpg", raw / "img_align_celeba/000099.jpg"),
        "holds 12 images, list_attr_celeba.txt lists 11: 1 are not listed, such as 000099.jpg",
    ),
}


@pytest.mark.parametrize("damage", CELEBA_DAMAGE)
def test_what_is_wrong_with_celeba_is_told_in_one_line(tmp_path, damage):
    raw = tmp_path / "raw"
    write_celeba(raw, 6, 3)
    do, message = CELEBA_DAMAGE[damage]
    do(raw)
    if damage == "value":  # of the attribute that is asked for
        text = (raw / celeba.ATTRIBUTES).read_text().splitlines()
        attribute = CELEBA_HEADER.split()[next(i for i, cell in enumerate(text[2].split()[1:]) if cell == "3")]
    else:
        attribute = "Male"
    said = refused(list_celeba, raw, attribute=attribute)
    assert said.startswith(str(raw)) and message in said


def test_an_unknown_attribute_is_told_the_forty(tmp_path):
    write_celeba(tmp_path / "raw", 3, 1)
    said = refused(list_celeba, tmp_path / "raw", attribute="male")
    assert said.startswith("dataset.attribute: 'male' is no attribute of ") and "Male, Mouth_Slightly_Open" in said


def test_a_zip_that_is_cut_off_is_told(tmp_path):
    raw = tmp_path / "raw"
    write_celeba(raw, 3, 1, as_zip=True)
    archive = raw / "img_align_celeba.zip"
    archive.write_bytes(archive.read_bytes()[:-200])
    assert refused(list_celeba, raw, attribute="Male").startswith(f"{archive}: is cut off or no zip file")


def test_celeba_is_fetched_by_torchvision(tmp_path, monkeypatch):
    """The network is played: what torchvision's download is asked for, and what becomes of its failure."""
    from torchvision.datasets import CelebA, utils

    write_celeba(tmp_path / "remote", 5, 2, as_zip=True)
    monkeypatch.setitem(__import__("sys").modules, "gdown", object())
    asked = []

    def fetch(file_id: str, root: Path, name: str, md5: str) -> None:
        asked.append((file_id, md5, name))
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "remote" / name, root)

    monkeypatch.setattr(utils, "download_file_from_google_drive", fetch)
    listing = list_celeba(tmp_path / "raw", attribute="Male", download=True)
    assert len(contents(listing, "train")) == 5
    assert set(asked) <= set(CelebA.file_list) and {name for *_, name in asked} == set(celeba.SIZES)

    def fail(file_id: str, root: Path, name: str, md5: str) -> None:
        raise RuntimeError("Failed to retrieve file url:\n\nToo many users")

    monkeypatch.setattr(utils, "download_file_from_google_drive", fail)
    said = refused(list_celeba, tmp_path / "other", attribute="Male", download=True)
    assert said.endswith("not fetched here: Failed to retrieve file url: Too many users")


# --- Parquet ----------------------------------------------------------------------------------------------------


def test_parquet_of_the_hub(tmp_path):
    images, labels = write_celebahq(tmp_path / "raw", 30, 11)
    listing = list_parquet(tmp_path / "raw", classes=["female", "male"])
    for split, part in (("train", slice(0, 30)), ("val", slice(30, 41))):
        assert sorted(contents(listing, split).values()) == sorted(zip(images[part], labels[part], strict=True))
    assert any("train-00001-of-00002.parquet, row 3" in name for name in contents(listing, "train"))
    assert listing.notes == []


def test_rows_are_mixed_so_that_the_first_are_of_all_classes(tmp_path):
    write_celebahq(tmp_path / "raw", 40, 4)  # sorted by class
    first = list_parquet(tmp_path / "raw", classes=["female", "male"], num_train=12)
    again = list_parquet(tmp_path / "raw", classes=["female", "male"], num_train=12)
    other = list_parquet(tmp_path / "raw", classes=["female", "male"], num_train=12, seed=1)
    assert set(first.splits["train"].labels.tolist()) == {0, 1}
    assert contents(first, "train") == contents(again, "train") != contents(other, "train")
    whole = list_parquet(tmp_path / "raw", classes=["female", "male"])
    in_place = {int(p): whole.splits["train"].name(i) for i, p in enumerate(whole.splits["train"].places)}
    assert {in_place[p] for p in range(12)} == set(contents(first, "train"))


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 1, 0], ("a", "b"), [0, 1, 1, 0]),
        ([0, 1, 1, 0], ("b", "a"), [1, 0, 0, 1]),
        ([0, 1, 1, 0], None, [0, 1, 1, 0]),
        (["a", "b", "b", "a"], None, [0, 1, 1, 0]),
        ([False, True, True, False], None, [0, 1, 1, 0]),
    ],
)
def test_labels_are_positions_in_the_configured_classes(tmp_path, labels, names, expected):
    images = [encoded(picture(i, 9, 9)) for i in range(4)]
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", images, labels, names=names)
    listing = list_parquet(tmp_path, classes=["a", "b"])
    assert dict(contents(listing, "train").values()) == dict(zip(images, expected, strict=True))
    assert bool(listing.notes) == (names == ("b", "a"))


def test_parquet_without_a_validation_split_is_split_by_class(tmp_path):
    images = [encoded(picture(i, 9, 9)) for i in range(40)]
    write_parquet(tmp_path / "0000.parquet", images, [int(i >= 30) for i in range(40)])
    listing = list_parquet(tmp_path, classes=["female", "male"], val_split=None, val_share=0.2)
    train, val = contents(listing, "train"), contents(listing, "val")
    assert np.bincount([label for _, label in val.values()]).tolist() == [6, 2]
    assert {data for data, _ in (*train.values(), *val.values())} == set(images) and len(train) == 32


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00006.parquet", "train"),
        ("data/validation-00000-of-00001-0123abc.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("0003.parquet", "train"),
        ("train/part-0003.parquet", "train"),
        ("celebahq.parquet", "celebahq"),
    ],
)
def test_the_split_stands_in_a_files_name(name, split):
    assert parquet.split_name(Path("raw") / name, Path("raw")) == split


def hq(folder: Path) -> Path:
    write_celebahq(folder / "raw", 8, 4)
    return folder / "raw"


PARQUET_DAMAGE = {
    "nothing": (lambda raw: shutil.rmtree(raw), {}, "no parquet files there: download *.parquet into "),
    "a shard lost": (
        lambda raw: (raw / "data/train-00001-of-00002.parquet").unlink(),
        {},
        "train-00001-of-00002.parquet is missing: download it into ",
    ),
    "a split lost": (
        lambda raw: (raw / "data/validation-00000-of-00001.parquet").unlink(),
        {},
        "dataset.val_split: no parquet file of the split 'validation' in ",
    ),
    "cut off": (
        lambda raw: (raw / "data/train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more"),
        {},
        "train-00001-of-00002.parquet: is cut off or no parquet file",
    ),
    "column": (lambda raw: None, {"image_column": "img"}, "has no column 'img'; it has: image, label"),
    "classes": (lambda raw: None, {"classes": ["man", "woman"]}, "names its classes female, male; use these names"),
    "label": (
        lambda raw: write_parquet(raw / "data/validation-00000-of-00001.parquet", [b"", b""], [0, 2]),
        {},
        "validation-00000-of-00001.parquet, row 1: the label 2 is no class; allowed: 0 .. 1 (female, male)",
    ),
    "no label": (
        lambda raw: write_parquet(raw / "data/validation-00000-of-00001.parquet", [b"", b""], [None, 1]),
        {},
        "row 0: the label None is no class",
    ),
}


@pytest.mark.parametrize("damage", PARQUET_DAMAGE)
def test_what_is_wrong_with_parquet_is_told_in_one_line(tmp_path, damage):
    raw = hq(tmp_path)
    do, changes, message = PARQUET_DAMAGE[damage]
    do(raw)
    assert message in refused(list_parquet, raw, **{"classes": ["female", "male"], **changes})


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    """The hub is played: a download that is cut off leaves its files, and the next goes on."""
    import huggingface_hub

    remote, raw = hq(tmp_path / "remote"), tmp_path / "raw"
    asked = []

    def fetch(repo, *, repo_type, revision, local_dir, allow_patterns):
        asked.append((repo, repo_type, revision))
        for file in sorted(remote.rglob("*.parquet"))[: len(asked)]:
            target = Path(local_dir) / file.relative_to(remote)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        if len(asked) < 3:
            raise OSError("Connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for missing in ("train-00001-of-00002.parquet is missing", "split 'validation'"):
        said = refused(list_parquet, raw, classes=["female", "male"], hub_id="a/b", revision="main")
        assert missing in said
    listing = list_parquet(raw, classes=["female", "male"], hub_id="a/b", revision="main")
    assert len(contents(listing, "train")) == 8
    list_parquet(raw, classes=["female", "male"], hub_id="a/b", revision="main")
    assert asked == [("a/b", "dataset", "main")] * 3  # and no more once it is whole


# --- Folders ----------------------------------------------------------------------------------------------------

SPLIT = {"classes": ["cats", "dogs"], "val_share": 0.2, "seed": 0}


def names(listing, split: str) -> list[str]:
    return [listing.splits[split].name(i) for i in range(len(listing.splits[split].labels))]


def test_a_folder_per_class_is_split_by_seed_and_name(tmp_path):
    write_folders(tmp_path / "raw", {"cats": 10, "dogs": 15})
    listing = list_folders(tmp_path / "raw", **SPLIT)
    assert np.bincount(listing.splits["val"].labels).tolist() == [2, 3]
    assert np.bincount(listing.splits["train"].labels).tolist() == [8, 12]
    assert not set(names(listing, "train")) & set(names(listing, "val"))
    for name, (data, label) in contents(listing, "train").items():
        assert name.startswith(SPLIT["classes"][label])
        assert (tmp_path / "raw" / name).read_bytes() == data
    other = list_folders(tmp_path / "raw", **SPLIT | {"seed": 1})
    assert names(other, "val") != names(listing, "val")


def test_the_split_does_not_depend_on_the_order_of_files_on_disk(tmp_path, monkeypatch):
    import os

    write_folders(tmp_path / "raw", {"cats": 10, "dogs": 15})
    before = list_folders(tmp_path / "raw", **SPLIT)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top, **how: ((p, d, f[::-1]) for p, d, f in walk(top, **how)))
    after = list_folders(tmp_path / "raw", **SPLIT)
    assert [names(before, split) for split in before.splits] == [names(after, split) for split in after.splits]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_and_val_folders_are_the_split(tmp_path, val):
    write_folders(tmp_path / "raw/train", {"cats": 3, "dogs": 4})
    write_folders(tmp_path / f"raw/{val}", {"cats": 2, "dogs": 1}, first=50)
    listing = list_folders(tmp_path / "raw", **SPLIT)
    assert [len(listing.splits[split].labels) for split in ("train", "val")] == [7, 3]
    assert all(name.startswith(f"{val}/") for name in names(listing, "val"))


def test_a_link_to_nowhere_is_an_image_like_any_other_until_it_is_read(tmp_path):
    write_folders(tmp_path / "raw", {"cats": 4, "dogs": 4})
    (tmp_path / "raw/cats/gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_folders(tmp_path / "raw", **SPLIT)
    assert "cats/gone.png" in names(listing, "train") + names(listing, "val")
    assert "cats/gone.png missing" in listing.files


def test_other_files_are_left_out_with_a_note(tmp_path):
    write_folders(tmp_path / "raw", {"cats": 5, "dogs": 5, "cats/more": 2, ".git": 1})
    for name in ("cats/notes.txt", "cats/.DS_Store", "dogs/Thumbs.db"):
        (tmp_path / "raw" / name).write_text("no image")
    (tmp_path / "raw/dogs/UPPER.JPG").write_bytes(encoded(picture(9, 8, 8), "JPEG"))
    listing = list_folders(tmp_path / "raw", **SPLIT)
    assert sum(len(split.labels) for split in listing.splits.values()) == 13
    assert listing.notes == ["left out 1 files that are no images, such as cats/notes.txt"]


FOLDER_DAMAGE = {
    "no folder": (lambda raw: shutil.rmtree(raw), ": no such folder; dataset.path must name"),
    "a class lost": (
        lambda raw: shutil.rmtree(raw / "dogs"),
        ": has no folder for the class dogs; dataset",
    ),
    "a class more": (lambda raw: write_folders(raw, {"birds": 1}), ": has folders that are no class: birds; dataset.c"),
    "no val": (
        lambda raw: write_folders(raw / "train", {"cats": 1}),
        ": has train/, but neither of val, valid",
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_what_is_wrong_with_folders_is_told_in_one_line(tmp_path, damage):
    raw = tmp_path / "raw"
    write_folders(raw, {"cats": 2, "dogs": 2})
    do, message = FOLDER_DAMAGE[damage]
    do(raw)
    assert refused(list_folders, raw, **SPLIT).startswith(f"{raw}{message}")


TABLE = {
    "labels": "labels.csv",
    "image_column": "image",
    "label_column": "label",
    "split_column": None,
    "image_suffix": "",
    **SPLIT,
}


def labelled(raw: Path, rows: list[list[object]]) -> Path:
    write_folders(raw, {"all": 12})
    write_csv(raw / "labels.csv", rows)
    return raw


ROWS = [["image", "other", "label"], *([f"all/{i}.png", "x", ("cats", "dogs")[i % 2]] for i in range(10))]


@pytest.mark.parametrize("form", ["names", "numbers", "semicolons", "suffix"])
def test_a_csv_says_which_image_is_what(tmp_path, form):
    rows = ROWS
    if form == "numbers":
        rows = [ROWS[0], *([a, b, ("cats", "dogs").index(c)] for a, b, c in ROWS[1:])]
    elif form == "suffix":
        rows = [ROWS[0], *([a.removesuffix(".png"), b, c] for a, b, c in ROWS[1:])]
    raw = labelled(tmp_path / "raw", rows)
    if form == "semicolons":
        (raw / "labels.csv").write_text((raw / "labels.csv").read_text().replace(",", ";"), encoding="utf-8-sig")
    listing = list_labelled(raw, **TABLE | {"image_suffix": ".png" if form == "suffix" else ""})
    found = {name: label for split in listing.splits for name, (_, label) in contents(listing, split).items()}
    assert found == {f"all/{i}.png": i % 2 for i in range(10)}
    assert len(listing.splits["val"].labels) == 2
    assert listing.notes == ["left out 2 images that labels.csv does not list, such as all/10.png"]


def test_a_csv_of_another_system_and_odd_names(tmp_path):
    """CRLF, a byte order mark, quoted commas and quotes, an umlaut, a blank."""
    odd = ['über, all/a "b".png', "all/0.png", "all/1.png", "all/2.png"]
    raw = labelled(tmp_path / "raw", [["image", "label"], *([name, i % 2] for i, name in enumerate(odd))])
    (raw / odd[0]).parent.mkdir()
    (raw / odd[0]).write_bytes((raw / "all/3.png").read_bytes())
    table = (raw / "labels.csv").read_text()
    (raw / "labels.csv").write_text(table, encoding="utf-8-sig", newline="\r\n")
    listing = list_labelled(raw, **TABLE)
    found = {name: label for split in listing.splits for name, (_, label) in contents(listing, split).items()}
    assert found == {name: i % 2 for i, name in enumerate(odd)}


def test_a_csv_may_hold_the_split(tmp_path):
    splits = ["train", "train", "valid", "val", "test"] * 2
    raw = labelled(
        tmp_path / "raw",
        [["image", "split", "label"], *([a, s, c] for (a, _, c), s in zip(ROWS[1:], splits, strict=True))],
    )
    listing = list_labelled(raw, **TABLE | {"split_column": "split"})
    assert sorted(names(listing, "train")) == [f"all/{i}.png" for i in (0, 1, 5, 6)]
    assert sorted(names(listing, "val")) == [f"all/{i}.png" for i in (2, 3, 7, 8)]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"label_column": "class"}, "has no column 'class'; it has: image, other, label; set "),
        (ROWS, {"labels": "none.csv"}, "none.csv: no such file"),
        (
            [*ROWS, ["all/11.png", "x", "bird"]],
            {},
            "labels.csv, line 12: the label 'bird' is no class; allowed: cats, dogs",
        ),
        ([ROWS[0], ["all/1.png", "x", 0], ["all/2.png", "x", 2]], {}, "line 3: the label '2' is no class"),
        ([*ROWS, ROWS[1]], {}, "labels.csv, line 12: all/0.png is listed twice"),
        ([*ROWS, ["all/99.png", "x", "cats"]], {}, "lists 11 images, 1 of them are not in "),
        ([*ROWS, ["all/11.png", "x"]], {}, "line 12: 2 cells, the header has 3"),
        (ROWS, {"split_column": "other"}, "line 2: the split 'x' is none of train, val, test"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told_in_one_line(tmp_path, rows, changes, message):
    raw = labelled(tmp_path / "raw", rows)
    assert message in refused(list_labelled, raw, **TABLE | changes)


# --- Orders and splits ------------------------------------------------------------------------------------------


def test_an_added_image_moves_no_other():
    words = [f"{i}.png" for i in range(100)]
    before = [words[i] for i in mixed_order(words, 3)]
    more = [*words, "new.png"]
    after = [more[i] for i in mixed_order(more, 3)]
    assert [word for word in after if word != "new.png"] == before
    assert before != words and sorted(before) == sorted(words)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [([10, 20], 0.1, [1, 2]), ([3, 1], 0.1, [1, 0]), ([4, 4], 0.9, [3, 3]), ([2], 0.5, [1])],
)
def test_each_class_keeps_an_image_for_training(counts, share, expected):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert np.bincount(labels[split_off(labels, share)], minlength=len(counts)).tolist() == expected
