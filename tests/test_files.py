"""Files are whole or not there, also when the writing fails half way."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nrcg import files
from nrcg.files import (
    atomic_save_array,
    atomic_write_text,
    join_group,
    naming,
    read_record,
    remove_leftovers,
    replace_folder,
    sha256_file,
    temporary_name,
    write_record,
)


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


# --- What a kill leaves -----------------------------------------------------------------------------------------


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = os.uname().nodename
    dead = [f".x.npy.{here}.{gone.pid}.tmp", f"a/.ddpm.{here}.{gone.pid}.tmp/unet/w", f".ddpm.{here}.{gone.pid}.old/w"]
    kept = [
        f".x.npy.{here}.{os.getpid()}.tmp",  # at work
        f".x.npy.elsewhere.{gone.pid}.tmp",  # another machine's
        f"x.npy.{here}.{gone.pid}.tmp",
        ".hidden.tmp",
        "a/x.npy",
    ]
    for name in (*dead, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert set(read(tmp_path)) == set(kept)
    assert not any(path.name.endswith((".tmp", ".old")) for path in tmp_path.rglob("*") if path.is_dir())
    remove_leftovers(tmp_path / "missing")


def test_the_first_of_a_group_is_alone_while_it_clears_up(tmp_path):
    """The second may neither join meanwhile nor clear up; a lock of its own would be taken for a leftover."""
    lock, said = tmp_path / "lock", tmp_path / "said"
    code = (
        "import sys; from pathlib import Path; from nrcg.files import join_group\n"
        "first = join_group(sys.argv[1], alone=lambda: Path(sys.argv[2]).write_text('cleared'))\n"
        "print(first, flush=True); sys.stdin.read()"
    )

    def start():
        words = [sys.executable, "-c", code, str(lock), str(said)]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    others = []

    def clear_up():
        others.append(start())
        time.sleep(1.5)
        assert others[0].poll() is None
        assert not said.exists()

    assert join_group(lock, alone=clear_up)
    assert others[0].stdout.readline() == "False\n"
    others[0].communicate("")
    files._locks.pop().close()
    alone = start()
    assert alone.stdout.readline() == "True\n"
    alone.kill()
    alone.communicate()
    assert said.read_text() == "cleared"


# --- Records and full disks -------------------------------------------------------------------------------------


def test_a_record_is_read_back_and_a_changed_one_refused(tmp_path):
    path, record = tmp_path / "record.json", {"a": 1.5, "b": {"c": [None, "ü"]}, "1": True}
    write_record(path, record)
    found = read_record(path)
    assert {key: found[key] for key in record} == record
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(ValueError, match="has changed since it was written"):
        read_record(path)
    path.write_text(json.dumps(record))  # an earlier version's
    assert read_record(path) == record


@pytest.mark.parametrize(
    "error, number",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EACCES, "Permission denied", "/tmp/other"), errno.EACCES),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),  # as safetensors says it
    ],
)
def test_a_failed_write_names_the_file(tmp_path, error, number):
    with pytest.raises(OSError) as caught, naming(tmp_path / "a" / "x.npy"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a" / "x.npy"))


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), naming(tmp_path / "x"):
        raise RuntimeError("shapes do not match")


def test_what_cannot_be_an_id_of_the_hub_is_not_looked_for_there():
    assert all(map(files.may_be_hub_id, ("google/ddpm-cifar10-32", "a_b/c.d", Path("nobody/nothing"))))
    assert not any(map(files.may_be_hub_id, ("nope", "models/quickstart/ddpm", "/tmp/ddpm", "./ddpm", "../ddpm", "")))
