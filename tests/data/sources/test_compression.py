"""Compressed files are read as what they hold, in bounded memory; damaged ones are refused by name."""

import gzip
import os
import tracemalloc
import types

import pyarrow as pa
import pytest

from common.errors import UserError
from data.sources import compression, files
from data.sources.compression import open_bytes
from data.sources.files import FilesCorpus
from tests.data.sources.test_tables import TEXTS, write_table
from tests.support import configured

TEXT = "".join(f"line {i}, ünï 🙂\n" for i in range(1000))


def compressed(content: bytes, suffix: str) -> bytes:
    return gzip.compress(content) if suffix == "gz" else pa.compress(content, codec="zstd", asbytes=True)


@pytest.fixture(params=["gz", "zst"])
def suffix(request, monkeypatch):
    monkeypatch.setattr(compression, "BLOCK_BYTES", 1000)
    return request.param


def read(**settings):
    corpus = configured(FilesCorpus, **settings)
    return corpus.fingerprint(), [document[1:] for document in corpus.read()]


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read(path=str(path))
    return str(caught.value)


@pytest.mark.parametrize("document", [None, "line", "\\n"], ids=["file", "line", "separator"])
@pytest.mark.parametrize("part", [64, 2**24])
def test_compressed_text_is_that_of_the_file(tmp_path, monkeypatch, suffix, document, part):
    monkeypatch.setattr(files, "PART_BYTES", part)
    for text in (TEXT, "\ufeff" + TEXT, TEXT.replace("\n", " ")):
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / f"a.txt.{suffix}").write_bytes(compressed(text.encode(), suffix))
        if document is None or "\n" in text:
            same = read(path=f"{tmp_path}/a.txt", document=document)
            assert read(path=f"{tmp_path}/a.txt.{suffix}", document=document) == same


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_compressed_tables_are_read_by_the_name_within(tmp_path, suffix, kind):
    write_table(tmp_path / f"a.{kind}", TEXTS)
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(compressed((tmp_path / f"a.{kind}").read_bytes(), suffix))
    _, found = read(path=str(path))
    assert [text for text, *_ in found] == TEXTS


def test_compressed_parts_of_a_file_are_read_one_after_the_other(tmp_path, suffix):
    half = len(TEXT.encode()) // 2
    whole = b"".join(compressed(part, suffix) for part in (TEXT.encode()[:half], TEXT.encode()[half:]))
    (tmp_path / f"a.{suffix}").write_bytes(whole)
    _, found = read(path=f"{tmp_path}/a.{suffix}")
    assert "".join(text for text, *_ in found) == TEXT


def test_compressed_file_seeks_as_a_plain_one(tmp_path, suffix):
    content = TEXT.encode()
    (tmp_path / f"a.{suffix}").write_bytes(compressed(content, suffix))
    with open_bytes(f"{tmp_path}/a.{suffix}") as file:
        for place, count in ((5000, 7), (3, 4000), (15_000, 10), (0, 1), (len(content) - 3, 9)):
            assert file.seek(place) == place and file.read(count) == content[place : place + count]
        assert file.seek(0, os.SEEK_END) == len(content) and file.read(1) == b""
        file.seek(10)
        assert file.seek(-4, os.SEEK_CUR) == 6 and file.read(5) == content[6:11]


def test_compressed_damaged_raises_error_with_name(tmp_path, suffix):
    path = tmp_path / f"a.txt.{suffix}"
    whole = compressed(os.urandom(20_000).hex().encode(), suffix)
    cut = [whole[: len(whole) // 2], whole[:-3], whole + b"garbage"]
    flipped = [whole[:5000] + b"\0" * 99 + whole[5099:]]  # zstd as pyarrow writes it has no checksum
    for damaged in cut + (flipped if suffix == "gz" else []):
        path.write_bytes(damaged)
        line = refusal(path)
        assert f"{path} cannot be read: its " in line and "data is damaged or cut short (" in line
    for other in (whole[9:], b"text\n"):
        path.write_bytes(other)
        codec = compression.CODECS[f".{suffix}"]
        assert refusal(path) == (
            f"{path} cannot be read: it is named .{suffix} and does not begin as {codec} data does: rename it without "
            f".{suffix}"
        )
    path.write_bytes(compressed(b"text \xff", suffix))
    assert f"{path} is not UTF-8 text (at byte 5)" in refusal(path)
    for empty in (compressed(b"", suffix), b""):
        path.write_bytes(empty)
        assert f"{path} is empty" in refusal(path)


def test_compressed_table_that_compresses_by_itself_raises_error(tmp_path, suffix):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / f"{name}.{suffix}").write_bytes(compressed(b"any", suffix))
        assert f"compresses by itself: decompress it, and give it as {tmp_path}/{name}" in refusal(
            f"{tmp_path}/{name}.{suffix}"
        )
        (tmp_path / f"{name}.{suffix}").unlink()


def test_compressed_by_what_is_not_there_raises_error(tmp_path, suffix, monkeypatch):
    (tmp_path / f"a.{suffix}").write_bytes(compressed(b"text\n", suffix))
    monkeypatch.setattr(pa, "Codec", types.SimpleNamespace(is_available=lambda codec: False))
    assert "the installed pyarrow has no" in refusal(f"{tmp_path}/a.{suffix}")


def test_compressed_file_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 2**18)
    for suffix in ("gz", "zst"):
        (tmp_path / f"a.{suffix}").write_bytes(compressed(b"a line of words\n" * 2**20, suffix))
        corpus = configured(FilesCorpus, path=f"{tmp_path}/a.{suffix}")
        corpus.fingerprint()
        tracemalloc.start()
        held = pa.total_allocated_bytes()
        most = max(pa.total_allocated_bytes() - held for _ in corpus.read())
        assert tracemalloc.get_traced_memory()[1] < 2**23 and most < 2**23  # of 16 MiB
        tracemalloc.stop()
