"""Damage is found before anything runs: shards and results are set aside to be made anew, data and models refused."""

import json
import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.storage import save_classifier
from nrcg.cli import main
from nrcg.config import load
from nrcg.errors import DataError
from nrcg.files import read_record, sha256_file, write_record
from nrcg.pipeline import integrity
from nrcg.pipeline.integrity import Sums, damaged_sources, refuse_damaged_sources, remedy, set_aside_damaged

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


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.csv", "metrics/robust.csv", "forward.csv", "reference.json", "report.html"),
        pytest.param("paper_comparison.md", id="comparison"),
    ],
)
def test_a_result_that_is_cut_off_is_set_aside(tmp_path, name):
    """Wherever it is cut, but for the very end of a row: a table of fewer rows is whole."""
    text = {
        ".csv": 'method,scale,accuracy\nrobust,1,0.25\n"a, b",2,0.5\n',
        ".json": '{"images": 5, "judge": {"ece": 0.1}}\n',
        ".html": "<!doctype html><html><body>5</body></html>\n",
        ".md": "| FID | 5 |\n",
    }[Path(name).suffix]
    path = tmp_path / "results/toy" / name
    path.parent.mkdir(parents=True)
    ends = {
        ".csv": {text.find("\nrobust") + 15, len(text)},
        ".md": {len(text)},
    }.get(path.suffix, {len(text) - 1, len(text)})
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


@pytest.mark.parametrize("name", ["reference.json", "summary.json"])
def test_a_changed_digit_of_a_sealed_result_is_set_aside(tmp_path, name):
    path = tmp_path / "results/toy" / name
    write_record(path, {"robust": {"cfd_judge": 5.25}})
    assert set_aside_damaged(tmp_path) == []
    path.write_text(path.read_text().replace("5.25", "5.35"))
    assert len(set_aside_damaged(tmp_path)) == 1


def test_no_flipped_bit_of_a_png_goes_unseen(tmp_path):
    path = tmp_path / "results/toy/figures/a.png"
    path.parent.mkdir(parents=True)
    plt.imsave(path, np.arange(12.0).reshape(3, 4))
    whole = path.read_bytes()
    assert set_aside_damaged(tmp_path) == []
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        assert len(set_aside_damaged(tmp_path)) == 1, position


@pytest.mark.parametrize("text", ["<svg><g></svg>", "<svg>&unknown;</svg>", "<svg/><svg/>", ""])
def test_an_svg_that_is_no_xml_is_set_aside(tmp_path, text):
    path = tmp_path / "results/toy/figures/a.svg"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(set_aside_damaged(tmp_path)) == 1


def test_no_external_entity_of_an_svg_is_read(tmp_path):
    path = tmp_path / "results/toy/figures/a.svg"
    path.parent.mkdir(parents=True)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # who opens it waits for ever
    path.write_text(f'<!DOCTYPE svg [<!ENTITY x SYSTEM "file://{fifo}">]><svg>&x;</svg>')
    assert set_aside_damaged(tmp_path) == []


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
    assert str(error.value).startswith(f"{name}: damaged (")
    assert str(error.value).endswith(
        f"; restore it (under DVC: rm {name} && dvc checkout {name}), or make it anew with all that belongs to it: "
        f"rm {name} && snakemake {name} --cores all --resources gpu=1"
    )
    assert "\n" not in str(error.value)
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
        assert remedy(other, "fetch it") == "fetch it"
    Path("Snakefile").unlink()
    assert remedy(path, "fetch it") == "fetch it"


def test_adopt_refuses_damaged_data(sources, monkeypatch, capsys):
    shutil.copy(CONFIG, "config.yaml")
    name = f"data/{load('config.yaml').experiments['quickstart'].dataset.name}"
    Path("data/balls").rename(name)
    flip(Path(name, "val/images.npy"))
    assert main(["adopt"]) == 1
    assert capsys.readouterr().err.startswith(f"nrcg: {name}/val/images.npy: damaged (not what dataset.json says")


# --- The cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["5", "null", "[[1], 2, 3]", '{"a": 1}', "[]", "\x00"])
def test_a_line_of_the_cache_that_is_no_entry_is_skipped(sources, line):
    assert found() == []
    cache = Path(integrity.CACHE)
    cache.write_text(f"{line}\n{cache.read_text()}")
    assert found() == []
    assert set_aside_damaged(Path()) == []


def test_a_file_is_not_judged_damaged_by_the_cache_alone(sources):
    assert found() == []
    cache = Path(integrity.CACHE)
    entries = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(entries) == len(FILES) - len(SOURCES)
    cache.write_text("".join(json.dumps([name, state, "0" * 64]) + "\n" for name, state, _ in entries))
    assert found() == []


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
