"""Files are whole or not there, also when the writing fails half way."""

import hashlib

import numpy as np
import pytest

from nrcg import files
from nrcg.files import atomic_save_array, atomic_write_text, replace_folder, sha256_file, temporary_name


def read(folder):
    """All files below a folder with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WRITERS = [
    pytest.param(atomic_write_text, "grün\n", "grün\n".encode(), id="text"),
    pytest.param(atomic_save_array, np.arange(5), None, id="array"),
]


@pytest.mark.parametrize("write, content, expected", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_files_are_written_with_their_folders(tmp_path, write, content, expected, there):
    path = tmp_path / "a" / "b" / "file"
    if there:
        path.parent.mkdir(parents=True)
        path.write_text("old")
    write(path, content)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    if expected is None:
        assert np.array_equal(np.load(path, allow_pickle=False), content)
    else:
        assert path.read_bytes() == expected


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "write, content, broken",
    [
        pytest.param(atomic_write_text, "text \ud800", None, id="text that cannot be encoded"),
        pytest.param(atomic_save_array, np.array([{}], dtype=object), None, id="array that needs a pickle"),
        pytest.param(atomic_write_text, "new", "pathlib.Path.replace", id="text, the move fails"),
        pytest.param(atomic_save_array, np.zeros(3), "pathlib.Path.replace", id="array, the move fails"),
        pytest.param(atomic_save_array, np.zeros(3), "numpy.save", id="array, the disk is full"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, content, broken, there):
    path = tmp_path / "file"
    if there:
        path.write_text("old")
    before = read(tmp_path)

    def fail(*_, **__):
        raise OSError("No space left on device")

    if broken:
        monkeypatch.setattr(broken, fail)
    with pytest.raises((OSError, ValueError)):
        write(path, content)
    assert read(tmp_path) == before


def test_temporary_names_lie_beside_the_file_hidden(tmp_path):
    name = temporary_name(tmp_path / "x.npy")
    assert name.parent == tmp_path and name.name.startswith(".") and name.name != "x.npy"


def test_processes_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    first = temporary_name(tmp_path / "x")
    monkeypatch.setattr(files.os, "getpid", lambda: -1)
    assert temporary_name(tmp_path / "x") != first


def folder_of(path, **contents):
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", [lambda final: final.with_name("new"), temporary_name], ids=["new", "temporary"])
def test_replace_folder(tmp_path, there, name):
    final = tmp_path / "models" / "ddpm"
    if there:
        folder_of(final, old="1", both="1")
    replace_folder(folder_of(name(final), both="2"), final)
    assert read(tmp_path) == {"models/ddpm/both": b"2"}


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    folder_of(tmp_path / "final", old="1")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", tmp_path / "final")
    assert read(tmp_path) == {"final/old": b"1"}


@pytest.mark.parametrize("content", [b"", b"abc", bytes(3_000_000)])
def test_sha256(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()
