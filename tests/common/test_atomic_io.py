"""Atomic writes: whole or not at all, whatever fails in between. And locks and checksums."""

import errno
import json
import os
import subprocess
import sys

import pytest

from common.atomic_io import (
    NotRegularFile,
    atomic_folder,
    exists,
    make_folder,
    names_in,
    read_regular,
    remove_atomic,
    remove_unfinished,
    write_atomic,
)
from common.checksummed_json import parse_verified, with_checksum
from common.errors import UserError
from common.lock import lock
from tests.support import ROOT


def test_write_atomic_failure_keeps_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    for call in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(call, fail)
            write_atomic(path, b"two")
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert path.read_bytes() == b"one"


def fail(*_):
    raise OSError("the disk is full")


def fail_with(rename, source, target):
    """Fail where a new folder is renamed to its final name."""
    fail() if source.name.startswith(".writing-") else rename(source, target)


@pytest.mark.parametrize("fault", [None, "block", "os.fsync", "os.rename", "second rename"])
def test_atomic_folder_failure_keeps_old_folder(tmp_path, monkeypatch, fault):
    final = tmp_path / "f"
    with atomic_folder(final) as writing:
        (writing / "a").write_text("one")
        assert not final.exists()
    if fault is not None:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            if fault == "second rename":
                patch.setattr("os.rename", lambda *paths, rename=os.rename: fail_with(rename, *paths))
            elif fault != "block":
                patch.setattr(fault, fail)
            with atomic_folder(final) as writing:
                (writing / "a").write_text("two")
                if fault == "block":
                    fail()
        assert (final / "a").read_text() == "one"
    else:
        with atomic_folder(final) as writing:
            (writing / "b").write_text("two")
        assert [p.name for p in final.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("name", ["", "f"])
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_atomic_folder_killed_in_replacement_leaves_old_or_new(tmp_path, monkeypatch, killed_after, name):
    final, renamed, rename = tmp_path / "f", [], os.rename
    with atomic_folder(final) as writing:
        (writing / "a").write_text("old")

    def killed(*paths):
        if len(renamed) == killed_after:
            fail()
        rename(*paths)
        renamed.append(paths)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", killed)
        # A kill unwinds nothing.
        patch.setattr("common.atomic_io._finish_replacement", fail if killed_after == 2 else lambda *_: None)
        with pytest.raises(OSError, match="full"), atomic_folder(final) as writing:
            (writing / "a").write_text("new")
    remove_unfinished(tmp_path, "other")
    assert len([*tmp_path.iterdir()]) == (2 if killed_after == 2 else 1)
    remove_unfinished(tmp_path, name)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (final / "a").read_text() == ("new" if killed_after == 2 else "old")


def test_atomic_folder_syncs_before_rename(tmp_path, monkeypatch):
    """Otherwise a power failure leaves an empty file under the final name."""
    calls = []
    monkeypatch.setattr("common.atomic_io._sync", lambda path: calls.append(path.name.split("-")[0]))
    monkeypatch.setattr("os.rename", lambda *_: calls.append("rename"))
    with atomic_folder(tmp_path / "f") as writing:
        (writing / "a").touch()
        (writing / "b").touch()
    assert sorted(calls[:2]) == ["a", "b"]
    assert calls[2:] == [".writing", "rename", tmp_path.name.split("-")[0]]


def test_write_atomic_syncs_before_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda file: calls.append("sync"))
    monkeypatch.setattr("os.replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    monkeypatch.setattr("common.atomic_io._sync", lambda path: calls.append(path))
    write_atomic(tmp_path / "a", b"one")
    assert calls == ["sync", "rename", tmp_path]


def test_make_folder_syncs_all_that_a_new_folder_stands_in(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("common.atomic_io._sync", synced.append)
    make_folder(tmp_path / "a/b/c")
    assert synced == [tmp_path / "a/b", tmp_path / "a", tmp_path]
    make_folder(tmp_path / "a/b/d")
    assert synced[3:] == [tmp_path / "a/b"]
    make_folder(tmp_path / "a/b/d")
    assert synced[4:] == [] and (tmp_path / "a/b/d").is_dir()


def test_atomic_io_respects_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a", b"")
        make_folder(tmp_path / "x/y")
        with atomic_folder(tmp_path / "f") as writing:
            (writing / "b").touch()
    finally:
        os.umask(before)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("*"))


def test_remove_unfinished_removes_leftovers_of_name(tmp_path):
    for name in (".writing-a-1", ".writing-b-1", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / ".writing-file").touch()
    remove_unfinished(tmp_path, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writing-b-1", ".writing-file", "a"]
    remove_unfinished(tmp_path)
    remove_atomic(tmp_path / "a")
    assert not list(tmp_path.iterdir())


IRREGULAR = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "larger": lambda path: path.write_bytes(b"12345"),
}


@pytest.mark.parametrize("stand", IRREGULAR.values(), ids=IRREGULAR)
def test_read_regular_other_files_raise_not_regular_file(tmp_path, stand):
    (tmp_path / "whole").write_bytes(b"1234")
    assert read_regular(tmp_path / "whole", 4) == b"1234"
    stand(tmp_path / "a")
    with pytest.raises(NotRegularFile) as refused:
        read_regular(tmp_path / "a", 4)
    assert refused.value.strerror


def test_exists_unknown_path_raises_os_error(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    assert exists(tmp_path / "a") and not exists(tmp_path / "b") and not exists(tmp_path / "a/c")
    assert names_in(tmp_path) == ["a"] and names_in(tmp_path / "b") == []
    (tmp_path / "link").symlink_to(tmp_path / "disk that is away")
    for look in (exists, names_in, lambda path: write_atomic(path, b"anew")):
        with pytest.raises(OSError, match="it is a link that leads nowhere"):
            look(tmp_path / "link")
    assert names_in(tmp_path) == ["a", "link"]
    for function in ("os.stat", "os.listdir"):
        monkeypatch.setattr(function, denied)
    with pytest.raises(PermissionError):
        exists(tmp_path / "a")
    with pytest.raises(PermissionError):
        names_in(tmp_path)


def denied(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("stand", [*IRREGULAR.values()][:3], ids=[*IRREGULAR][:3])
def test_lock_on_link_leaves_target_untouched(tmp_path, stand):
    (tmp_path / "precious").write_text("kept")
    os.symlink(tmp_path / "precious", tmp_path / ".lock")
    stand(tmp_path / "other")
    for name in (".lock", "other"):
        with pytest.raises(OSError, match="no regular file"):
            lock(tmp_path / name, "busy")
    assert (tmp_path / "precious").read_text() == "kept"


def test_lock_is_released_when_process_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from common.lock import lock\n"
    code += "held = lock(Path('.lock'), 'busy'); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="busy"):
        lock(tmp_path / ".lock", "busy")
    process.kill()
    process.wait()
    with lock(tmp_path / ".lock", "busy"), pytest.raises(UserError, match="busy"):
        lock(tmp_path / ".lock", "busy")
    with lock(tmp_path / ".lock", "busy"):
        pass


def test_parse_verified_any_changed_character_raises_error():
    content = {"a": [1, 2.5, None], "b": {"é": "x"}}
    text = with_checksum(content)
    assert parse_verified(text) == content
    for i, character in enumerate(text):
        changed = text[:i] + ("7" if character != "7" else "8") + text[i + 1 :]
        with pytest.raises(ValueError):
            parse_verified(changed)
    for nonsense in ("", "[]", "3", "{}", json.dumps(content), "[" * 100_000, '{"hash": {}}'):
        with pytest.raises(ValueError):
            parse_verified(nonsense)
