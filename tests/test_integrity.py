"""Damaged shards are found before anything runs and set aside, to be made anew."""

import json
import os
from pathlib import Path

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
