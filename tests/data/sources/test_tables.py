"""Rows of tables and lines of text as documents: each once, in order, with a name that locates it."""

import csv
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from common.errors import UserError
from data.sources import files
from data.sources.corpus import hash_sample
from data.sources.files import FilesCorpus
from data.sources.tables import cells
from tests.support import configured

TEXTS = [f'row {i}, with "quotes",\nline ends and ünï🙂' for i in range(300)]


def write_batches(open_writer, path, table: pa.Table) -> None:
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def write_table(path, texts, column="text"):
    rows = [{"n": i, column: text} for i, text in enumerate(texts)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    elif path.suffix == ".arrow":  # a stream, as `datasets` writes it
        write_batches(pa.ipc.new_stream, path, pa.Table.from_pylist(rows))
    elif path.suffix == ".feather":
        feather.write_feather(pa.Table.from_pylist(rows), path, compression="zstd", chunksize=70)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet writes it
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["n", column], *([row["n"], row[column]] for row in rows)])


@pytest.fixture(params=["jsonl", "json", "csv", "tsv", "parquet", "arrow", "feather"])
def table(request, tmp_path):
    path = tmp_path / f"a.{request.param}"
    write_table(path, TEXTS)
    return path


def read(**settings):
    corpus = configured(FilesCorpus, **settings)
    corpus.fingerprint()
    return list(corpus.read())


def refusal(**settings) -> str:
    with pytest.raises(UserError) as caught:
        read(**settings)
    return str(caught.value)


def test_table_every_row_is_one_document_in_order(table):
    found = read(path=str(table))
    assert [document.text for document in found] == TEXTS
    assert len({document.name for document in found}) == len(TEXTS)
    assert all(re.fullmatch(rf"{re.escape(str(table))}:\d+", document.name) for document in found)
    assert 0.05 < sum(document.held_out for document in found) / len(TEXTS) < 0.15
    by_index = read(path=str(table), held_out_by="index")
    assert [d.held_out for d in by_index] == [hash_sample(i, 0.1) for i in range(len(TEXTS))]


def test_table_split_is_stable_when_rows_are_added(tmp_path):
    write_table(tmp_path / "a.jsonl", TEXTS)
    before = read(path=f"{tmp_path}/a.jsonl")
    write_table(tmp_path / "a.jsonl", TEXTS + TEXTS)
    assert read(path=f"{tmp_path}/a.jsonl")[: len(before)] == before


def test_table_unknown_column_raises_error_with_columns(table):
    assert " has no column body, it has " in refusal(path=str(table), column="body")
    assert "a." in refusal(path=str(table), column="body") and "has n, text" in refusal(path=str(table), column="body")


def test_table_rows_without_text_are_skipped(tmp_path):
    for path in (tmp_path / f"a.{kind}" for kind in ("jsonl", "json", "parquet", "arrow", "csv")):
        write_table(path, ["one", None, "", "two"])
        found = read(path=str(path))
        assert [document.text for document in found] == ["one", "two"]
        assert found[1].name.endswith(":7" if path.suffix == ".jsonl" else ":4")


BAD_TABLES = {
    "not JSON": ("a.jsonl", '{"text": "x"}\n{oops\n', "a.jsonl:2 is not JSON"),
    "not an object": ("a.jsonl", '{"text": "x"}\n[3]\n', "a.jsonl:2 is not a JSON object"),
    "an array": (
        "a.jsonl",
        '[{"text": "x"}]\n',
        "a.jsonl:1 is not a JSON object with a column of text: mend or remove it, or name a file that is one array "
        ".json",
    ),
    "nested": ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "a.jsonl:2 is not JSON"),
    "lacking": ("a.jsonl", '{"n": 3}\n{"body": "y"}\n', "{folder}/a.jsonl has no column text, it has n, body"),
    "number": ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "a.jsonl:2 holds int in column text, not text"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1 is not valid Unicode"),
    "short row": ("a.csv", "n,text\n1,x\n2\n", "a.csv, line 3, row 2 after the head, has 1 cells, the head has 2"),
    "open quote": ("a.csv", 'n,text\n1,"x\n', "a.csv, line 2, is not CSV"),
    "no Arrow": ("a.arrow", "text", "a.arrow is not an Arrow file"),
    "no Parquet": ("a.parquet", "text", "a.parquet is not a Parquet file"),
    "empty": ("a.jsonl", "", "a.jsonl is empty"),
    "blank": ("a.jsonl", "\n", "a.jsonl has no column text, it has none"),
    "binary": ("a.csv", "text\n\0\n", "a.csv holds NUL bytes"),
    "array cut short": ("a.json", '[{"text": "x"},\n{"text": ', "a.json is not JSON after row 1 (Expecting value)"),
    "array of none": ("a.json", "[]", "a.json has no column text, it has none"),
    "lacking in an array": ("a.json", '[{"n": 1}, {"body": "y"}]', "a.json has no column text, it has n, body"),
    "nested array": ("a.json", '[{"text": "x"}, ' + "[" * 100_000, "a.json is not JSON after row 1"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_table_damaged_raises_error_with_name(tmp_path, suffix):
    for name, content, complaint in BAD_TABLES.values():
        if name == f"a.{suffix}":
            (tmp_path / name).write_text(content)
            found = refusal(path=f"{tmp_path}/*")
            assert complaint.format(folder=tmp_path) in found and "\n" not in found


def test_parquet_damaged_raises_error_with_name(tmp_path):
    write_table(tmp_path / "a.parquet", [f"{i} " * 200 for i in range(300)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[200:1200] = bytes(1000)
    (tmp_path / "a.parquet").write_bytes(content)
    assert "a.parquet is damaged after row" in refusal(path=f"{tmp_path}/*")


@pytest.mark.parametrize("open_writer", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_damaged_raises_error_with_name(tmp_path, open_writer):
    path = tmp_path / "a.arrow"
    write_batches(open_writer, path, pa.table({"text": [f"{i} " * 200 for i in range(300)]}))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "a.arrow is damaged after row" in (cut := refusal(path=str(path))) or "a.arrow is not an Arrow" in cut
    first = content.index(b"0 0 0 ")
    path.write_bytes(content[: first - 100] + b"\x7f" * 90 + content[first - 10 :])  # offsets of texts
    assert "a.arrow is damaged after row 0" in refusal(path=str(path))


@pytest.mark.parametrize("open_writer", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_column_with_a_name_that_is_no_text_raises_error_with_name(tmp_path, open_writer):
    path = tmp_path / "a.arrow"
    write_batches(open_writer, path, pa.table({"text": TEXTS}))
    path.write_bytes(path.read_bytes().replace(b"text", b"\xffext"))
    assert "a.arrow is not an Arrow file: " in refusal(path=str(path))


def test_arrow_folder_of_datasets_is_read_whole(tmp_path):
    import datasets  # a second of imports, for this test alone

    rows = datasets.Dataset.from_list([{"n": i, "text": text} for i, text in enumerate(TEXTS)])
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=rows, test=rows.select([5])).save_to_disk(tmp_path / "splits")
    write_table(tmp_path / "saved" / "cache-1.arrow", ["a result that datasets kept"])
    assert [document.text for document in read(path=f"{tmp_path}/saved")] == TEXTS
    assert "is a dataset of several splits: write " in refusal(path=f"{tmp_path}/splits")
    assert [document.text for document in read(path=f"{tmp_path}/splits/train")] == TEXTS


def test_arrow_words_of_a_dictionary_are_text(tmp_path):
    write_batches(pa.ipc.new_stream, tmp_path / "a.arrow", pa.table({"text": pa.array(TEXTS).dictionary_encode()}))
    assert [document.text for document in read(path=f"{tmp_path}/a.arrow")] == TEXTS


def test_parquet_column_not_text_raises_error(tmp_path):
    write_table(tmp_path / "a.parquet", TEXTS)
    assert "holds int in column n, not text" in refusal(path=f"{tmp_path}/*", column="n")


def test_parquet_column_name_wins_over_struct_field(tmp_path, caplog):
    rows = [{"a": {"text": f"nested {i}"}, "a.text": f"flat {i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(path=f"{tmp_path}/a.parquet", column="a.text")
    assert [document.text for document in found] == [f"flat {i}" for i in range(5)]
    (warning,) = {record.message for record in caplog.records}
    assert "a.parquet: data.column=a.text reads the column of that name; the field text of the struct a is" in warning
    assert "holds dict in column a, not text" in refusal(path=f"{tmp_path}/a.parquet", column="a")


def test_parquet_row_not_utf8_raises_error_with_row(tmp_path):
    cells = pa.array([b"ab", b"caf\xc3\xa9", b"\xff\xfe", b"cd"])
    text = pa.Array.from_buffers(pa.string(), len(cells), cells.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert "a.parquet:3 is not UTF-8 text in column text" in refusal(path=f"{tmp_path}/*")


MISFITS = [
    ("a.json", {"document": "line", "column": "text"}, "is no table: leave it out"),
    ("a.csv", {"document": ";"}, "document=; does not fit"),
    ("a.csv", {"document": "file"}, "document=file does not fit"),
    ("a.csv", {"document": "line"}, "a table: choose row"),
    ("a.txt", {"document": "row"}, "choose file or line"),
    ("a.txt", {"column": "text"}, "is no table: leave it out"),
]


def test_files_document_setting_not_fitting_file_raises_error(tmp_path):
    for name, settings, complaint in MISFITS:
        (tmp_path / name).write_text("text\nx\n")
        assert complaint in refusal(path=f"{tmp_path}/{name}", **settings)


def test_files_lines_are_documents_without_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n\ntwo\r\nthree é".encode())
    found = read(path=f"{tmp_path}/a.txt", document="line")
    assert [d.text for d in found] == ["one", "two", "three é"]
    assert [d.name for d in found] == [f"{tmp_path}/a.txt:{n}" for n in (1, 3, 4)]


def test_files_lines_end_at_any_line_end(tmp_path):
    lines = [f"line {i}\x0b\x85\u2028 é" for i in range(300)]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
        assert [d.text for d in read(path=f"{tmp_path}/a.txt", document="line")] == lines


CRLF = "the lines end otherwise"
SEPARATED = {
    "a line of its own": (
        "<|endoftext|>",
        "one\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n",
        ["one\n\ntwo", "three"],
    ),
    "within a line": ("<|endoftext|>", "<|endoftext|>one<|endoftext|> two <|endoftext|>\n\n", ["one", " two "]),
    "empty lines, as they can be typed": ("\\n\\n", "one\ntwo\n\n\nthree\n", ["one\ntwo", "three"]),
    "carriage returns": ("---", "one\r\n---\r\ntwo", ["one", "two"]),
    "carriage returns in it": ("\\r\\n\\r\\n", "one\r\ntwo\r\n\r\nthree", ["one\r\ntwo", "three"]),
    "carriage returns left out": ("\\n\\n", "one\r\ntwo\r\n\r\nthree", CRLF),
    "overlapping": ("aa", "xaaay", ["x", "ay"]),
    "at the end": ("aa", "xa", None),
}


@pytest.mark.parametrize("part", [4, 16, 2**24])
def test_files_separator_splits_documents(tmp_path, monkeypatch, part):
    monkeypatch.setattr(files, "PART_BYTES", part)
    for case, (separator, text, expected) in SEPARATED.items():
        (tmp_path / "a.txt").write_bytes(text.encode())
        if expected is CRLF:
            assert refusal(path=f"{tmp_path}/*", document=separator).endswith("in \\r\\n: write that for each \\n")
        elif expected is None:
            assert f"data.document={separator!r} is no separator in" in refusal(
                path=f"{tmp_path}/*", document=separator
            )
        else:
            assert [d.text for d in read(path=f"{tmp_path}/*", document=separator)] == expected, case


def test_files_document_with_typo_raises_error():
    for slip in ("lines", "Line", "rows", "files"):
        with pytest.raises(ValueError, match=rf"data\.document={slip}: did you mean {slip.lower().rstrip('s')}\?"):
            configured(FilesCorpus, path="a.txt", document=slip)


@pytest.mark.parametrize("part", [4, 7, 64])
def test_files_long_file_comes_in_parts_of_its_text(tmp_path, monkeypatch, part):
    """For any size of the part in memory."""
    for text in ("ünï 🙂 line\n" * 40, "ünï🙂" * 90, "a\n" * 200, "é" + "\n" * 90):
        (tmp_path / "a.txt").write_text(text)
        whole = read(path=f"{tmp_path}/a.txt")
        with monkeypatch.context() as patch:
            patch.setattr(files, "PART_BYTES", part)
            found = read(path=f"{tmp_path}/a.txt")
        for held_out in (False, True):
            pieces = [d for d in found if d.held_out == held_out]
            assert "".join(d.text for d in pieces) == "".join(d.text for d in whole if d.held_out == held_out)
            assert [d.is_continuation for d in pieces] == [i > 0 for i in range(len(pieces))]
            assert all(len(d.text.encode()) <= part for d in pieces) and (held_out or len(pieces) > 1)


def test_files_invalid_bytes_are_located_across_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 8)
    for content in (b"\x80" * 50, b"ab\xff", b"abc\xc3", b"x" * 30 + b"\xf0\x9f"):
        (tmp_path / "a.txt").write_bytes(content)
        good = content.decode(errors="ignore").encode()
        assert f"is not UTF-8 text (at byte {len(good)})" in refusal(path=f"{tmp_path}/a.txt")


def test_table_ambiguous_content_warns(workplace, caplog):
    (workplace / "a.tsv").write_text('id\ttext\n1\t"Hello he said\n2\tfine\n3\tsaid he"\n4\tz\n')
    assert [text for _, text in cells("a.tsv", "text")] == ["Hello he said\n2\tfine\n3\tsaid he", "z"]
    assert "a.tsv:1 has tabs or line ends within quotes in column text, read as one cell" in caplog.text
    (workplace / "two.csv").write_text("text,text\nfirst,second\n")
    assert [text for _, text in cells("two.csv", "text")] == ["first"]
    assert "two.csv has 2 columns named text: the first is read" in caplog.text
    (workplace / "semicolons.csv").write_text("id;text\n1;some\n")
    with pytest.raises(UserError, match="has one column, id;text: separate its cells by commas instead of semicolons"):
        list(cells("semicolons.csv", "text"))
