"""Damage is found before anything runs: shards are set aside to be made anew, data and models refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.storage import save_classifier
from nrcg.cli import main
from nrcg.config import load
from nrcg.errors import DataError
from nrcg.files import read_record, sha256_file, write_record
from nrcg.pipeline import integrity
from nrcg.pipeline.integrity import Sums, damaged_sources, refuse_damaged_sources, set_aside_damaged
from nrcg.pipeline.remedies import explained, remedy

CONFIG = Path(__file__).parents[2] / "config.yaml"
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


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("name", [SHARD, SHARD.with_suffix(".json")], ids=["array", "record"])
def test_a_damaged_file_is_set_aside_until_it_is_made_anew(root, name, damage):
    before, content = names(root), (root / name).read_bytes()
    assert set_aside_damaged(root) == []
    damage(root / name)
    (line,) = set_aside_damaged(root)
    assert line.startswith(f"{root / name}: ")
    assert names(root) == before - {name.as_posix()} | {f"{name.as_posix()}.damaged"}
    assert set_aside_damaged(root) == []
    (root / name).write_bytes(content)
    assert set_aside_damaged(root) == []
    assert names(root) == before


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_shard_whose_trace_is_damaged_or_lost_is_set_aside(root, damage):
    images, trace = root / SHARD, (root / SHARD).with_suffix(".trace.npz")
    trace.write_bytes(bytes(range(100)))
    record = read_record(images.with_suffix(".json")) | {"trace_sha256": sha256_file(trace)}
    write_record(images.with_suffix(".json"), record)
    assert set_aside_damaged(root) == []
    damage(trace)
    (line,) = set_aside_damaged(root)
    assert line.startswith(f"{images}: has ") and trace.name in line
    assert not images.exists()


# --- Data and models ------------------------------------------------------------------------------------------------

SOURCES = {
    "data/balls/dataset.json": ["train/images.npy", "train/labels.npy", "val/images.npy"],
    "models/toy/ddpm/training.json": ["unet/diffusion_pytorch_model.safetensors", "data_mean.npy"],
    "models/toy/classifiers/robust/config.json": ["model.safetensors"],
}


def stated(record: str, sums: dict[str, str]) -> dict:
    """The checksums as the workflow's own records state them."""
    if record.endswith("dataset.json"):
        splits: dict = {}
        for name, digest in sums.items():
            splits.setdefault(name.split("/")[0], {"sha256": {}})["sha256"][Path(name).stem] = digest
        return {"splits": splits}
    return {"sha256": next(iter(sums.values()))} | ({"files": sums} if "ddpm" in record else {})


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A data set and models that are whole, in the working folder; their content does not matter."""
    for record, files in SOURCES.items():
        folder = (tmp_path / record).parent
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(f"{record} {name}".encode() * 9)
        sums = {name: sha256_file(folder / name) for name in files}
        write_record(tmp_path / record, {"seconds": 1.5} | stated(record, sums))
    (tmp_path / "Snakefile").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found() -> list[str]:
    return [str(path) for path, _ in damaged_sources(Path(), datasets=["balls"], experiments=["toy", "other"])]


FILES = [*SOURCES, *(f"{Path(record).parent}/{name}" for record, names in SOURCES.items() for name in names)]


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flip", "cut", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_data_and_models_are_refused_with_commands_and_a_lost_file_is_not(sources, name, damage):
    assert found() == []
    damage(Path(name))
    before = names(sources)
    with pytest.raises(DataError) as error:
        refuse_damaged_sources(Path(), datasets=["balls"], experiments=["toy"])
    assert names(sources) == before
    line = explained(error.value)
    assert line.startswith(f"{name}: damaged (")
    assert line.endswith(
        f"; restore it (under DVC: rm {name} && dvc checkout {name}), or make it anew with all that belongs to it: "
        f"rm {name} && snakemake {name} --cores all --resources gpu=1"
    )
    assert "\n" not in line
    Path(name).unlink()
    assert found() == []


def test_other_experiments_are_not_looked_at(sources):
    flip(Path("models/toy/ddpm/training.json"))
    flip(Path("data/balls/train/images.npy"))
    assert list(damaged_sources(Path(), datasets=["others"], experiments=["others"])) == []


@pytest.mark.parametrize("record", SOURCES)
def test_no_flipped_bit_of_a_record_goes_unseen(sources, record):
    """But for those that leave its content equal; also in the name of its own checksum."""
    path, whole = Path(record), Path(record).read_bytes()
    content = read_record(path)
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        assert found()[:1] == [record] or read_record(path) == content, position


@pytest.mark.parametrize("record", SOURCES)
def test_a_record_without_checksums_passes(sources, record):
    """As earlier versions leave them: without its own, or without any."""
    plain = read_record(record)
    del plain["record_sha256"]
    Path(record).write_text(json.dumps(plain))
    assert found() == []
    for name in SOURCES[record]:
        flip(Path(record).parent / name)
    assert len(found()) == len(SOURCES[record])
    Path(record).write_text("{}")
    assert found() == []


def test_a_kill_between_weights_and_their_record_is_no_damage(sources, monkeypatch):
    """New weights replace others; the process ends before their record is written."""
    folder = Path("models/toy/classifiers/robust")
    monkeypatch.setattr("nrcg.classifiers.storage.write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = sha256_file(folder / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        save_classifier(folder, build_module("small_cnn", 3, 0.1), {"architecture": "small_cnn"})
    assert sha256_file(folder / "model.safetensors") != before
    assert found() == []


def test_remedies_are_quoted_and_only_where_snakemake_makes_the_file(sources):
    path = Path("data/my images/dataset.json")
    assert remedy(path).endswith(": snakemake 'data/my images/dataset.json' --cores all --resources gpu=1")
    assert remedy(path.absolute()) == remedy(path)
    for other in ("foreign/ddpm/training.json", "models/toy/else/config.json", "../data/balls/dataset.json"):
        assert remedy(other).startswith("restore it, or ") and "snakemake" not in remedy(other)
    Path("Snakefile").unlink()
    assert remedy(path) == "restore it, or make the data set anew (see nrcg dataset --help)"


def test_adopt_refuses_damaged_data(sources, monkeypatch, capsys):
    shutil.copy(CONFIG, "config.yaml")
    name = f"data/{load('config.yaml').experiments['quickstart'].dataset.name}"
    Path("data/balls").rename(name)
    flip(Path(name, "val/images.npy"))
    assert main(["adopt"]) == 1
    assert capsys.readouterr().err.startswith(f"nrcg: {name}/val/images.npy: damaged (not what dataset.json says")


# --- The cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["5", "[[1], 2, 3]", '{"a": 1}', "\x00", '["half a li'])
def test_a_line_of_the_cache_that_is_no_entry_is_skipped(sources, line):
    assert found() == []
    cache = Path(integrity.CACHE)
    cache.write_text(f"{line}\n{cache.read_text()}")
    assert found() == []
    assert Sums().sha256(Path(FILES[-1])) == sha256_file(FILES[-1])


def test_a_file_is_not_judged_damaged_by_the_cache_alone(sources):
    assert found() == []
    cache = Path(integrity.CACHE)
    entries = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(entries) == len(FILES) - len(SOURCES)
    cache.write_text("".join(json.dumps([name, state, "0" * 64]) + "\n" for name, state, _ in entries))
    assert found() == []


def test_a_shards_record_without_its_own_checksum_is_damaged(root):
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
