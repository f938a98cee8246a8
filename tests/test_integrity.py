"""Damaged shards are found before anything runs and set aside, to be made anew."""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from nrcg import integrity
from nrcg.files import read_record, sha256_file, write_record
from nrcg.integrity import Sums, set_aside_damaged

SHARD = Path("results/toy/samples/robust/scale2.5/shard0001.npy")


@pytest.fixture
def root(tmp_path) -> Path:
    """A shard that is whole; its content does not matter."""
    path = tmp_path / SHARD
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(200)))
    write_record(path.with_suffix(".json"), {"sha256": sha256_file(path), "seconds": 12.5})
    return tmp_path


def flip(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def names(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and ".nrcg" not in path.parts
    }


def test_what_is_whole_stays(root):
    before = names(root)
    assert set_aside_damaged(root) == []
    assert names(root) == before


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("name", [SHARD, SHARD.with_suffix(".json")], ids=["array", "record"])
def test_a_damaged_file_is_set_aside_until_it_is_made_anew(root, name, damage):
    before, content = names(root), (root / name).read_bytes()
    damage(root / name)
    (line,) = set_aside_damaged(root)
    assert line.startswith(f"{root / name}: ")
    assert names(root) == before - {name.as_posix()} | {f"{name.as_posix()}.damaged"}
    assert set_aside_damaged(root) == []
    (root / name).write_bytes(content)
    assert set_aside_damaged(root) == []
    assert names(root) == before


@pytest.mark.parametrize("name", ["metrics.csv", "metrics/robust.csv", "forward.csv", "reference.json", "report.html"])
def test_a_result_that_is_cut_off_is_set_aside(tmp_path, name):
    """Wherever it is cut, but for the very end of a row: a table of fewer rows is whole."""
    text = {
        ".csv": 'method,scale,accuracy\nrobust,1,0.25\n"a, b",2,0.5\n',
        ".json": '{"images": 5, "judge": {"ece": 0.1}}\n',
        ".html": "<!doctype html><html><body>5</body></html>\n",
    }[Path(name).suffix]
    path = tmp_path / "results/toy" / name
    path.parent.mkdir(parents=True)
    ends = {text.index("\nrobust") + 15, len(text)} if path.suffix == ".csv" else {len(text) - 1, len(text)}
    for length in range(len(text) + 1):
        path.write_text(text[:length])
        found = set_aside_damaged(tmp_path)
        assert bool(found) == (length not in ends), text[:length]
        assert path.exists() == (not found)
        if found:
            assert found == [f"{path}: is cut off or damaged; set aside as {path.name}.damaged, to be made anew"]


def test_figures_that_are_cut_off_are_set_aside(tmp_path):
    folder = tmp_path / "results/toy/figures"
    folder.mkdir(parents=True)
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, 1])
    for name in ("a.png", "a.svg"):
        figure.savefig(folder / name)
    plt.close(figure)
    assert set_aside_damaged(tmp_path) == []
    for name in ("a.png", "a.svg"):
        whole = (folder / name).read_bytes()
        cut(folder / name)
        assert len(set_aside_damaged(tmp_path)) == 1
        assert names(tmp_path) >= {f"results/toy/figures/{name}.damaged"}
        (folder / name).write_bytes(whole)
        assert set_aside_damaged(tmp_path) == []
        assert names(tmp_path) == {"results/toy/figures/a.png", "results/toy/figures/a.svg"}


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "results/toy/my.csv"
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1")
    assert set_aside_damaged(tmp_path) == []


@pytest.mark.parametrize("position", range(0, 140, 3))
def test_no_flipped_byte_of_a_shards_record_goes_unseen(root, position):
    """What a flip leaves equal, such as one kind of space for another, is no damage."""
    path = root / SHARD.with_suffix(".json")
    before = read_record(path)
    flip(path, position)
    lines = set_aside_damaged(root)
    assert lines or read_record(path) == before


def test_a_record_without_its_own_checksum_is_damaged(root):
    path = root / SHARD.with_suffix(".json")
    path.write_text(json.dumps({"sha256": sha256_file(root / SHARD)}))
    (line,) = set_aside_damaged(root)
    assert line.startswith(f"{path}: is damaged (a key is missing)")


def test_a_file_is_read_again_only_when_it_has_changed(root, monkeypatch):
    path, read = root / SHARD, []
    monkeypatch.setattr(integrity, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    cache = root / "cache/sums.jsonl"
    first = Sums(cache).sha256(path)
    assert Sums(cache).sha256(path) == first == sha256_file(path)
    assert len(read) == 1
    times = path.stat()
    flip(path, 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    assert Sums(cache).sha256(path) == sha256_file(path) != first
    assert len(read) == 2


def test_a_cache_that_was_cut_off_is_used_as_far_as_it_goes(root):
    cache = root / "sums.jsonl"
    expected = Sums(cache).sha256(root / SHARD)
    cache.write_text(cache.read_text() + '["half a li')
    assert Sums(cache).sha256(root / SHARD) == expected
    assert json.loads(cache.read_text().splitlines()[0])[2] == expected
