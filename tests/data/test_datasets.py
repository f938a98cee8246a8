import json

import numpy as np
import pytest
import torch

from nrcg.data import arrays, sportballs, writing
from nrcg.errors import ConfigError, DataError, NrcgError

SETTING = {"image_size": 16, "classes": ("baseball", "basketball", "soccer"), "diameter": (0.45, 0.9)}


def make(folder, **changes):
    return sportballs.write_sportballs(
        folder, **{**SETTING, "num_train": 50, "num_val": 20, "seed": 3, "workers": 1, **changes}
    )


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "balls")
    return tmp_path / "balls"


def test_what_was_written_is_read(folder):
    expected, expected_labels = sportballs.render(3, np.arange(70), **SETTING)
    for split, part in (("train", slice(0, 50)), ("val", slice(50, 70))):
        images, labels = arrays.open_split(folder, split)
        assert isinstance(images, np.memmap) and not images.flags.writeable
        np.testing.assert_array_equal(images, expected[part])
        np.testing.assert_array_equal(labels, expected_labels[part])
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(np.load(folder / split / "images.npy", mmap_mode="r"), images)
    mean = arrays.mean_image(folder)
    assert mean.shape == (3, 16, 16) and mean.dtype == np.float32
    # float32 holds values of about 1 to 6e-8
    np.testing.assert_allclose(mean, arrays.to_unit(expected[:50]).double().mean(0), atol=2e-7)
    arrays.verify(folder)


def test_the_manifest_tells_what_the_data_are(folder):
    manifest = arrays.load_manifest(folder)
    _, labels = arrays.open_split(folder, "train")
    assert manifest["name"] == "sportballs"
    assert (manifest["image_size"], manifest["channels"]) == (16, 3)
    assert list(manifest["splits"]["train"]["class_counts"].values()) == np.bincount(labels).tolist()
    assert list(manifest["splits"]["val"]["class_counts"]) == list(SETTING["classes"])
    again = dict(manifest["generation"])
    assert sportballs.write_sportballs(folder.with_name("again"), **again) == manifest


def test_files_depend_neither_on_workers_nor_on_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sportballs, "PIECE_BYTES", 30 * 3 * 16 * 16)  # 70 images are several pieces
    seen = []
    one = make(tmp_path / "one", progress=lambda done, total: seen.append((done, total)))
    monkeypatch.setattr(sportballs, "PIECE_BYTES", 7 * 3 * 16 * 16)
    two = make(tmp_path / "two", workers=3)
    assert one == two
    assert len(seen) > 2 and seen[-1] == (70, 70) and seen == sorted(seen)


def test_the_number_of_torch_threads_is_left_as_it_was(tmp_path):
    before = torch.get_num_threads()
    make(tmp_path, workers=2)
    assert torch.get_num_threads() == before


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_run_that_stops_midway_leaves_nothing_that_looks_finished(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=stop)
    assert files(tmp_path) == []


def test_a_second_run_that_stops_midway_takes_the_old_manifest_away(folder, monkeypatch):
    monkeypatch.setattr(sportballs, "render", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(folder)
    assert not (folder / "dataset.json").exists()
    assert not [name for name in files(folder) if name.endswith(".partial")]
    monkeypatch.undo()
    make(folder)
    arrays.verify(folder)


def test_a_wrong_argument_leaves_an_old_data_set_alone(folder):
    with pytest.raises(ConfigError, match="golf"):
        make(folder, classes=("golf",))
    arrays.verify(folder)


def pieces(n, start=0, shape=(4, 4, 3), dtype=np.uint8):
    return start, np.full((n, *shape), 7, dtype), np.zeros(n, np.int64)


@pytest.mark.parametrize(
    "written, message",
    [
        ([pieces(4)], "6 of 10 images were never written"),
        ([pieces(4), pieces(4, start=3)], "written before"),
        ([pieces(11)], "beyond the end"),
        ([pieces(2, start=-1)], "beyond the end"),
        ([pieces(10, shape=(4, 5, 3))], "a piece must be uint8"),
        ([pieces(10, dtype=np.float32)], "a piece must be uint8"),
        ([(0, pieces(10)[1], np.zeros(9, np.int64))], "a piece must be uint8"),
        ([(0, pieces(10)[1], np.full(10, 2))], "labels go from 2 to 2, but there are 2 classes"),
    ],
)
def test_the_writer_refuses_wrong_pieces(tmp_path, written, message):
    with (
        pytest.raises(DataError, match=message),
        writing.SplitWriter(tmp_path / "train", 10, (4, 4, 3)) as writer,
    ):
        for piece in written:
            writer.write_piece(*piece)
        writer.finish(["a", "b"])
    assert files(tmp_path) == []


def test_pieces_may_come_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 4, 4, 1), np.uint8), rng.integers(0, 2, 10)
    with writing.SplitWriter(tmp_path, 10, (4, 4, 1)) as writer:
        for s in (6, 0, 3):
            e = min(s + 3, 10) if s < 6 else 10
            writer.write_piece(s, images[s:e], labels[s:e])
        entry = writer.finish(["a", "b"])
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), labels)
    np.testing.assert_array_equal(writer.total, images.sum(axis=0))
    assert entry["num_images"] == 10


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def relabel(path):
    np.save(path, np.full(50, 3))


DAMAGE = {
    "no manifest": ("dataset.json", lambda p: p.unlink(), "missing or unfinished"),
    "manifest cut": ("dataset.json", lambda p: p.write_text(p.read_text()[:90]), "cannot be read"),
    "manifest empty": ("dataset.json", lambda p: p.write_text("{}"), "lacks name, source"),
    "manifest a list": ("dataset.json", lambda p: p.write_text("[]"), "no record"),
    "images gone": ("train/images.npy", lambda p: p.unlink(), "no such file"),
    "images cut": ("train/images.npy", cut, "cut off"),
    "images empty": ("train/images.npy", lambda p: p.write_bytes(b""), "cut off"),
    "images longer": ("train/images.npy", lambda p: p.write_bytes(p.read_bytes() + b"x"), "its header says"),
    "images text": ("train/images.npy", lambda p: p.write_text("hello there"), "cut off or unreadable"),
    "images of another shape": (
        "train/images.npy",
        lambda p: np.save(p, np.zeros((9, 9), np.uint8)),
        "holds",
    ),
    "labels of another type": (
        "train/labels.npy",
        lambda p: np.save(p, np.zeros(50, np.int32)),
        "holds int32",
    ),
    "labels cut": ("train/labels.npy", lambda p: p.write_bytes(p.read_bytes()[:-8]), "cut off"),
    "a label too high": ("train/labels.npy", relabel, "labels go from 3 to 3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_in_one_line_that_names_the_file(folder, damage):
    name, spoil, message = DAMAGE[damage]
    spoil(folder / name)
    with pytest.raises(NrcgError, match=message) as caught:
        arrays.open_split(folder, "train")
    assert str(caught.value).startswith(f"{folder / name}: ") and "\n" not in str(caught.value)
    assert caught.value.path == folder / name  # the command line knows what to do about it


@pytest.mark.parametrize("name", ["train/images.npy", "val/labels.npy", "train/mean.npy"])
def test_verify_finds_a_single_flipped_bit(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-160] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256 differs") as caught:
        arrays.verify(folder)
    assert name in str(caught.value)


def test_a_damaged_mean_image_is_found(folder):
    cut(folder / "train" / "mean.npy")
    with pytest.raises(DataError, match=r"mean\.npy"):
        arrays.mean_image(folder)


def test_the_manifest_is_plain_json(folder):
    text = (folder / "dataset.json").read_text()
    assert json.loads(text) == arrays.load_manifest(folder)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive_the_way_to_tensors_and_back(channels):
    images = np.arange(256 * channels).reshape(2, 16, 8, channels).astype(np.uint8)
    tensor = arrays.to_unit(images)
    assert tensor.shape == (2, channels, 16, 8) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_array_equal(arrays.to_uint8(tensor), images)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-9.0, -1.0, 1 / 255 - 1 + 1e-4, 1.0, float("inf"), float("-inf"), float("nan")])
    assert arrays.to_uint8(values.reshape(1, 1, 1, -1)).ravel().tolist() == [0, 0, 1, 255, 255, 0, 0]
    values = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).reshape(1, 1, 1, 2)
    assert arrays.to_uint8(values).ravel().tolist() == [128, 255]


@pytest.mark.parametrize(
    "call",
    [
        lambda: arrays.to_unit(np.zeros((1, 4, 4, 3), np.float32)),
        lambda: arrays.to_unit(np.zeros((4, 4, 3), np.uint8)),
        lambda: arrays.to_uint8(torch.zeros(3, 4, 4)),
        lambda: arrays.open_split("nowhere", "test"),
    ],
)
def test_misuse_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()
