"""Glob patterns: each file once, by whatever links a pattern reaches it, and no pattern without end."""

import errno
import glob
import os

import pytest

from common.errors import UserError
from common.paths import files_below, matching_files
from data.sources.files import FilesCorpus
from data.sources.hub import HubCorpus
from data.sources.python_source import SympyCorpus
from tests.support import configured


@pytest.fixture
def tree(workplace):
    for path in ("d/a.txt", "d/b.txt", "d/.hidden.txt", "d/sub/c.txt", "d/sub/deep/a.txt", "d/.git/x.txt", "e/f.txt"):
        place = workplace / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"the text of {path}\n" * 9)
    return workplace


PATTERNS = ["d/*.txt", "d/**/*.txt", "d/**", "**/*.txt", "*/*/*.txt", "d/[ab].txt", "d/?.txt", "d/.*.txt", "d/.git/*"]


def test_matching_files_agrees_with_glob(tree):
    for pattern in [*PATTERNS, "./d/*.txt", "d/../e/*", "d", "d/a.txt", "nothing/*", "d/a.txt/*"]:
        for prefix in ("", f"{tree}/"):
            expected = sorted(path for path in glob.glob(prefix + pattern, recursive=True) if os.path.isfile(path))
            assert matching_files(prefix + pattern) == expected


def test_matching_files_with_link_cycles_gives_each_file_once(tree):
    patterns = ["d/**/*.txt", "d/**/**/*.txt", "d/**", "d/**/**", "**/[a-z].txt"]
    expected = {pattern: matching_files(pattern) for pattern in patterns}
    for link, target in {"self": ".", "again": ".", "sub/up": "..", "sub/deep/root": str(tree)}.items():
        (tree / "d" / link).symlink_to(target)
    (tree / "d" / "z.txt").symlink_to("a.txt")
    os.link(tree / "d" / "b.txt", tree / "d" / "y.txt")
    assert {pattern: matching_files(pattern) for pattern in patterns} == expected
    documents = list(configured(FilesCorpus, path="d/**/*.txt").read())
    train, val = ([d.name for d in documents if d.held_out == side] for side in (False, True))
    assert train == val == ["d/a.txt", "d/b.txt", "d/sub/c.txt", "d/sub/deep/a.txt"]


def test_matching_files_follows_named_links(tree):
    """Folders on other disks are often linked: as in a shell, only ** does not enter links."""
    (tree / "link").symlink_to("d/sub")
    (tree / "one.txt").symlink_to("d/a.txt")
    (tree / "gone.txt").symlink_to("nothing")
    (tree / "loop.txt").symlink_to("loop.txt")
    assert matching_files("link/*.txt") == matching_files("l*k/*.txt") == ["link/c.txt"]
    assert matching_files("link/**/*.txt") == ["link/c.txt", "link/deep/a.txt"]
    assert matching_files("*.txt") == ["one.txt"]


def test_matching_files_existing_name_is_literal(tree, monkeypatch):
    for name in ("book [v1].txt", "book 1.txt", "vol [2]/a.txt", "vol 2/a.txt"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("x")
    assert matching_files("book [v1].txt") == ["book [v1].txt"]
    assert matching_files("vol [2]/*.txt") == ["vol [2]/a.txt"]
    assert matching_files("book [12].txt") == ["book 1.txt"]
    assert matching_files("d\0/*.txt") == []  # no path
    monkeypatch.setenv("HOME", str(tree / "d"))
    assert matching_files("~/[a]*.txt") == [f"{tree}/d/a.txt"]


def test_matching_files_skips_pipes_and_devices(tree):
    os.mkfifo(tree / "d" / "pipe.txt")
    assert matching_files("d/*.txt") == ["d/a.txt", "d/b.txt"]
    assert "pipe.txt" not in {path.name for path in files_below(tree / "d")}
    for path in ("d/pipe.txt", "/dev/zero"):
        with pytest.raises(UserError, match=r"is a pipe or a device, .*: write what it gives to a file"):
            configured(FilesCorpus, path=path).fingerprint()


def failing(function, path: str, code: int):
    def called(asked, *rest, **more):
        if str(asked) == path:
            raise OSError(code, os.strerror(code), path)
        return function(asked, *rest, **more)

    return called


UNREADABLE = [  # what fails, where, and who reads it
    ("scandir", "d/sub", configured(FilesCorpus, path="d/**/*.txt")),
    ("scandir", "d", configured(FilesCorpus, path="d/*.txt")),
    ("stat", "d/a.txt", configured(FilesCorpus, path="d/a.txt")),
    ("stat", "d", configured(FilesCorpus, path="d")),
    ("scandir", "d/sub", configured(HubCorpus, path="d")),
    ("stat", "d", configured(HubCorpus, path="d")),
]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_fingerprint_of_unreadable_folder_raises_error_with_its_name(tree, monkeypatch, code):
    for function, path, corpus in UNREADABLE:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing(getattr(os, function), path, code))
            with pytest.raises(UserError, match=rf"^{path} cannot be read: {os.strerror(code)}"):
                corpus.fingerprint()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EISDIR])
def test_fingerprint_of_unreadable_file_raises_error_with_its_name(workplace, monkeypatch, code):
    error = OSError(code, os.strerror(code))
    names = ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"]
    corpora, sympy = {name: configured(FilesCorpus, path=name) for name in names}, configured(SympyCorpus)
    for name in names:
        (workplace / name).write_text("x\n")
    for place in ("data.sources.files.Path.open", "data.sources.tables.open"):
        monkeypatch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(error), raising=False)
    for name, corpus in corpora.items():
        with pytest.raises(UserError, match=rf"^{name} cannot be read: {os.strerror(code)}"):
            corpus.fingerprint()
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"add\.py cannot be read|__init__\.py cannot be read"):
        sympy.fingerprint()


def test_fingerprint_in_a_deleted_working_directory_raises_user_error(workplace):
    (workplace / "gone").mkdir()
    os.chdir(workplace / "gone")
    (workplace / "gone").rmdir()
    with pytest.raises(UserError, match=r"matches no file \(looked from a working directory that does not exist"):
        configured(FilesCorpus, path="*.txt").fingerprint()
