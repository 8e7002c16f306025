"""Corpora: the documents they read, and the files they reject."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from common.errors import UserError
from data.sources.files import FilesCorpus
from data.sources.python_source import SYMPY_FINGERPRINT, StdlibCorpus, SympyCorpus
from data.sources.synthetic import SyntheticCorpus
from tests.support import configured


def test_sympy_has_known_fingerprint_and_is_split_by_file():
    corpus = configured(SympyCorpus)
    assert corpus.fingerprint() == SYMPY_FINGERPRINT
    train, val = ({document.name for document in corpus.documents(split)} for split in ("train", "val"))
    assert not train & val
    assert 0.03 < len(val) / len(train) < 0.1
    assert not any("tests" in name.split("/") for name in train | val)
    assert "core/add.py" in train | val


def test_stdlib_is_python_source_without_tests():
    corpus = configured(StdlibCorpus)
    train, val = ({document.name for document in corpus.documents(split)} for split in ("train", "val"))
    assert 0.02 < len(val) / len(train) < 0.1
    assert {"argparse.py", "json/decoder.py"} <= train | val
    for name in train | val:
        assert not {"test", "tests", "site-packages"} & set(name.split("/")) and "_sysconfigdata" not in name
    assert corpus.fingerprint() == configured(StdlibCorpus).fingerprint()


def test_stdlib_without_source_raises_user_error(monkeypatch, tmp_path):
    monkeypatch.setattr(StdlibCorpus, "_root", staticmethod(lambda: tmp_path))
    with pytest.raises(UserError, match="holds no Python source"):
        configured(StdlibCorpus).fingerprint()


def test_sympy_other_version_warns(caplog, monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(SympyCorpus, "_root", staticmethod(lambda: tmp_path))
    configured(SympyCorpus).fingerprint()
    assert "is not the source of sympy==1.14.0" in caplog.text


def test_files_hold_out_last_part_of_each_cut_after_line_end(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(100)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("ünï\n" * 50)
    corpus = configured(FilesCorpus, path=f"{tmp_path}/**/*.txt")
    train, val = (list(corpus.documents(split)) for split in ("train", "val"))
    assert [d.name for d in train] == [d.name for d in val] == sorted(str(p) for p in tmp_path.rglob("*.txt"))
    for first, last in zip(train, val, strict=True):
        whole = Path(first.name).read_text()
        assert first.text + last.text == whole
        assert first.text.endswith("\n")
        assert 0.85 < len(first.text) / len(whole) < 0.95


@pytest.mark.parametrize("text", ["one long line " * 100, "one long line " * 100 + "\n"])
def test_files_with_one_line_are_split(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    corpus = configured(FilesCorpus, path=f"{tmp_path}/a.txt")
    (train,), (val,) = (list(corpus.documents(split)) for split in ("train", "val"))
    assert train.text + val.text == text
    assert 0.05 < len(val.text) / len(text) < 0.15


def test_files_with_unusual_names_are_read_unchanged(tmp_path):
    """Line ends are kept; names that look like archives, patterns or nested paths are names of files."""
    texts = {"crlf.txt": "a\r\nb\rc\n" * 50, "a::b.txt": "x\n" * 50, "a[1].txt": "y\n" * 50, "b.gzip": "z\n" * 50}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    corpus = configured(FilesCorpus, path=f"{tmp_path}/*")
    train, val = (list(corpus.documents(split)) for split in ("train", "val"))
    found = {Path(a.name).name: a.text + b.text for a, b in zip(train, val, strict=True)}
    assert found == texts


def test_files_fingerprint_changes_with_content_only(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    corpus = configured(FilesCorpus, path=f"{tmp_path}/*.txt")
    before = corpus.fingerprint()
    (tmp_path / "a.txt").touch()
    assert before == corpus.fingerprint()
    (tmp_path / "b.txt").write_text("two\n")
    assert corpus.fingerprint() != before


NO_TEXTS = [
    (b"", "is empty"),
    (b"text \xff\xfe", r"is not UTF-8 text \(at byte 5\): convert or exclude it; .* tables named \.jsonl"),
    (b"a\0b\n", r"NUL bytes \(the first at byte 1\), .*: convert or exclude it"),
    (b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\n", "is a PDF, .*: convert or exclude it; what is read is UTF-8 text"),
    (b"{\\rtf1 all of it ASCII}\n", "is RTF"),
    ("text\n".encode("utf-16"), "is UTF-16"),
    ("text\n".encode("utf-32"), "is UTF-32"),
    ("漢字\n".encode("utf-16-be"), "NUL bytes .*, as UTF-16, UTF-32 and binary files do"),
    ("text\n".encode("utf-32-le"), "NUL bytes"),
    (b"PK\x03\x04 and so on", "is a zip archive"),
    (gzip.compress(b"text\n", mtime=0), "is compressed by gzip"),
    (bz2.compress(b"text\n"), "is compressed by bzip2"),
    (lzma.compress(b"text\n"), "is compressed by xz"),
    (b"\x28\xb5\x2f\xfd and so on", "is compressed by zstd"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"\n <!DOCTYPE html>\n", "is an HTML page, as it begins: convert it to text or exclude it; to train on it as"),
    (None, "matches no file"),
]


@pytest.mark.parametrize("name", ["a.txt", "b txt.jsonl", "c txt.json", "d txt.csv"])
def test_files_not_text_raise_error_with_name(tmp_path, name):
    """For any suffix."""
    for content, complaint in NO_TEXTS:
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        if name != "a.txt" and content and content.endswith((b">\n", b"\xfe")):
            complaint = "is not JSON|is not UTF-8 text|has no column text"
        corpus = configured(FilesCorpus, path=f"{tmp_path}/*txt*")
        with pytest.raises(UserError, match=complaint) as caught:
            corpus.fingerprint()
        assert "txt" in str(caught.value) and "\n" not in str(caught.value)


def test_files_path_that_matches_no_file_says_what_a_path_is(workplace):
    for path in ("nothing/*.txt", "a=b", "<a=b> [1].txt"):
        with pytest.raises(UserError, match=r"matches no file.*a path or a quoted pattern, as in") as caught:
            configured(FilesCorpus, path=path).fingerprint()
        assert f"data.path={path!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.html", "<p>words</p>\n", "is HTML"),
        ("a.HTM", "words\n", "is HTML"),
        ("a.md", "\ufeff<html>\n", "is an HTML page, as it begins"),
        ("a.ipynb", '{"cells": []}\n', "is a Jupyter notebook"),
        (
            "a.json",
            '{"name": "x",\n "version": 1}\n',
            "has no column text, it has name, version: give one as data.column=;",
        ),
        ("a.json", "[[1, 2]]\n", "a.json:1 is not a JSON object"),
        ("a.json", "words\n", r"a\.json is not JSON \(Expecting value\)"),
    ],
)
def test_files_with_markup_need_document_file(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{complaint}.* as it is, give data.document=file"):
        configured(FilesCorpus, path=f"{tmp_path}/*").fingerprint()
    corpus = configured(FilesCorpus, path=f"{tmp_path}/*", document="file")
    corpus.fingerprint()
    assert "".join(document.text for document in corpus.read()) == content.removeprefix("\ufeff")


@pytest.mark.parametrize("document", [None, "line", "\\n"], ids=["file", "line", "separator"])
def test_files_byte_order_mark_is_not_part_of_text(tmp_path, document):
    for text, val_fraction in (("a\n", 0.1), ("words\n", 0.999), ("line of words\n" * 100, 0.5)):
        (tmp_path / "a.txt").write_text("\ufeff" + text)
        corpus = configured(FilesCorpus, path=f"{tmp_path}/a.txt", document=document, val_fraction=val_fraction)
        corpus.fingerprint()
        assert "".join(d.text for d in corpus.read()) == (text.replace("\n", "") if document else text)


def test_synthetic_same_seed_gives_same_documents():
    first, again, other = (
        [list(corpus.documents(split)) for split in ("train", "val")]
        for corpus in (configured(SyntheticCorpus, size=20, seed=seed) for seed in (0, 0, 1))
    )
    assert first == again != other
    assert len(first[0]) == 18
    assert len(first[1]) == 2
