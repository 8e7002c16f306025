"""What is read as a whole and is too long is refused by its place, before it takes memory without bound."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from data.shards import build
from data.sources import bounds, files
from data.sources.corpus import Document
from data.sources.files import FilesCorpus
from tests.support import configured

LIMIT = 1000
LONG = "a" * (3 * LIMIT)
TOO_LONG = {
    "line": ("a.txt", "one\n" + LONG, {"document": "line"}, "a.txt:2"),
    "separated": ("a.txt", "one|" + LONG, {"document": "|"}, "a.txt:2"),
    "line of JSON": ("a.jsonl", '{"text": "x"}\n' + LONG, {}, "a.jsonl:2"),
    "value": ("a.json", '[{"text": "x"},\n{"text": "' + LONG, {}, "a.json, in its row 2,"),
    "head": ("a.csv", LONG, {}, "a.csv, the row that begins in line 1,"),
    "cells": ("a.tsv", "text\nx\n" + LONG.replace("aa", "a\t"), {}, "a.tsv, the row that begins in line 3,"),
    "open quote": ("a.csv", 'text\nx\n"' + "ab\n" * LIMIT, {}, "a.csv, the row that begins in line 3,"),
}
ROWS = {  # what stands before and after a row, or a text of a file
    "line": ("a.txt", "one\n", "\ntwo", {"document": "line"}, "a.txt:2"),
    "separated": ("a.txt", "one|", "|two", {"document": "|"}, "a.txt:2"),
    "line of JSON": ("a.jsonl", '{"text": "one"}\n', '\n{"text": "two"}', {}, "a.jsonl:2"),
    "value": ("a.json", '[{"text": "one"},', ', {"text": "two"}]', {}, "a.json, in its row 2,"),
    "cells": ("a.csv", "text\none\n", "\ntwo\n", {}, "a.csv, the row that begins in line 3,"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bounds, "MAX_LENGTH", LIMIT)
    monkeypatch.setattr(files, "PART_BYTES", 300)
    monkeypatch.setattr("data.sources.json_values.READ_CHARS", 100)


def read(path, **settings) -> list[str]:
    corpus = configured(FilesCorpus, path=str(path), **settings)
    corpus.fingerprint()
    return [document.text for document in corpus.read()]


def refusal(path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return str(caught.value)


def refusal_line(place: str) -> str:
    unit = "bytes" if place.startswith("a.jsonl") else "characters"
    return f"{place} is longer than 1,000 {unit}, the most that is read as one: divide it, or exclude the file"


@pytest.mark.parametrize("name", TOO_LONG)
def test_text_read_as_one_that_is_too_long_raises_error_with_place(workplace, name):
    path, content, settings, place = TOO_LONG[name]
    line = refusal_line(place)
    (workplace / path).write_text(content)
    assert line in refusal(path, **settings)
    (workplace / f"{path}.gz").write_bytes(gzip.compress(content.encode()))
    assert line.replace(path, f"{path}.gz") in refusal(f"{path}.gz", **settings)


@pytest.mark.parametrize("name", ROWS)
def test_text_up_to_the_bound_is_read_and_no_longer(workplace, name):
    """A line, of a table too, counts with its end."""
    path, before, after, settings, place = ROWS[name]
    frame = '{"text": ""}' if "json" in path else ""
    text = "b" * (LIMIT - len(frame) - (after[0] == "\n"))
    (workplace / path).write_text(before + frame.replace('""', f'"{text}"') + text * (not frame) + after)
    assert read(path, **settings) == ["one", text, "two"]
    text += "b"
    (workplace / path).write_text(before + frame.replace('""', f'"{text}"') + text * (not frame) + after)
    assert refusal_line(place) in refusal(path, **settings)


def test_separator_not_found_in_a_long_file_raises_error_with_the_way_out(workplace):
    (workplace / "a.txt").write_bytes(b"one\r\n\r\n" * LIMIT)
    line = f"no separator in a.txt: it does not stand in its first {LIMIT:,} characters, the most that is read as one; "
    assert line + "the lines end in \\r\\n: write that for each \\n" in refusal("a.txt", document="\\n\\n")
    assert line + "give one that does, or file or line, or exclude the file" in refusal("a.txt", document="---")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_cell_that_is_too_long_raises_error_with_row(workplace, kind):
    table = pa.table({"text": ["x", LONG]})
    if kind == "parquet":
        pq.write_table(table, "a.parquet")
    else:
        with pa.ipc.new_stream("a.arrow", table.schema) as writer:
            writer.write_table(table)
    assert f"a.{kind}:2, in column text, is longer than 1,000 characters" in refusal(f"a.{kind}")


def test_word_without_end_raises_error_with_name():
    parts = [Document("a.txt", "a" * 300, held_out=False, is_continuation=i > 0) for i in range(9)]
    with pytest.raises(UserError, match=r"a\.txt, in a passage where no word ends, is longer than 1,000 characters"):
        list(build._cut_between_words(parts))
