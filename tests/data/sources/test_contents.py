"""The summary of a corpus and the warnings about it."""

import os

import pytest

from data.shards import build
from data.shards.prepare import prepare
from data.sources import contents
from data.sources.contents import Contents
from data.sources.files import FilesCorpus
from data.sources.mix import MixCorpus, Part
from data.sources.python_source import SympyCorpus
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.byte import ByteConfig
from tests.support import configured

STORY = "once upon a time\n"


def counted(corpus) -> Contents:
    found = Contents()
    for document in corpus.read():
        found.add(document)
    return found


@pytest.fixture
def stories(workplace):
    """Three files, two of them equal, and a table of 40 rows, two of them equal to others."""
    for name, text in {"a": STORY * 30, "b": STORY * 30, "c": STORY * 31}.items():
        (workplace / f"{name}.txt").write_text(text)
    rows = [f"row {i % 38}" for i in range(40)]
    (workplace / "rows.csv").write_text("text\n" + "".join(f"{row}\n" for row in rows))
    return workplace


def test_summary_counts_files_documents_and_duplicates(stories, caplog):
    caplog.set_level("INFO")
    corpus = configured(FilesCorpus, path="*.*")
    made = prepare(corpus, configured(ByteConfig), stories / "cache")
    line = "4 files, 43 documents, 3 of them identical to an earlier one"
    assert [r.message for r in caplog.records].count(f"data=files: {line}") == 1
    assert prepare(corpus, configured(ByteConfig), stories / "cache").contents == made.contents == line
    (made.folder / "contents.txt").unlink()  # as of shards that are older than it
    assert prepare(corpus, configured(ByteConfig), stories / "cache").contents is None
    (made.folder / "train_documents.jsonl").unlink()
    for name in ("contents.txt", "train_documents.jsonl"):
        os.mkfifo(made.folder / name)
    assert made.contents is None and made.training_documents([(0, 9)]) == []  # no pipe is waited for


def test_summary_document_in_parts_counts_once(stories, monkeypatch):
    monkeypatch.setattr("data.sources.files.PART_BYTES", 50)
    books, words = configured(FilesCorpus, path="*.txt"), configured(SyntheticCorpus, size=10)
    assert counted(books).summary(3) == "3 files, 3 documents, 1 of them identical to an earlier one"
    mix = configured(MixCorpus, parts={"words": Part(quota=1, corpus=words), "books": Part(quota=1, corpus=books)})
    names = {document.name for document in mix.read()}
    assert counted(mix).summary(3) == f"3 files, {len(names)} documents, 1 of them identical to an earlier one"
    assert {"books/a.txt", "books/b.txt", "books/c.txt", "words/synthetic/0"} <= names


def test_summary_default_corpus_has_no_duplicates():
    corpus = configured(SympyCorpus)
    files = len(corpus.sources())
    assert counted(corpus).summary(files) == f"{files} files, {files} documents"


def test_summary_compares_at_most_max_compared_documents(stories, monkeypatch):
    monkeypatch.setattr(contents, "MAX_COMPARED", 39)
    found = counted(configured(FilesCorpus, path="rows.csv"))
    assert found.summary(1) == "1 file, the first 39 documents, 1 of them identical to an earlier one"
    assert sum(found.bytes.values()) == sum(len(f"row {i % 38}") for i in range(40))


def test_measure_empty_split_raises_error_with_summary(stories):
    (stories / "one.csv").write_text("text\n" + "the same\n" * 500)
    with pytest.raises(build.UserError, match=r"is empty, of 1 file, 500 documents, 499 of them identical to an"):
        build.measure(configured(FilesCorpus, path="one.csv"))


def test_measure_empty_split_of_rows_without_text_raises_error_with_their_number(stories):
    for skipped, lacking in ((1, r"1 of 2 rows has"), (3, r"3 of 4 rows have")):
        (stories / "one.jsonl").write_text('{"text": "the same"}\n' + '{"text": null}\n' * skipped)
        line = rf"is empty, of 1 file, 1 document: more or longer text is needed\. {lacking} no text \(column text\)$"
        with pytest.raises(build.UserError, match=line):
            build.measure(configured(FilesCorpus, path="one.jsonl"))
    for rows, all_of_them in ((1, "as 1 row has no text"), (5, "as all 5 rows have no text")):
        (stories / "none.jsonl").write_text('{"text": null}\n' * rows)
        with pytest.raises(build.UserError, match=all_of_them):
            build.measure(configured(FilesCorpus, path="none.jsonl"))


@pytest.mark.parametrize("marker", contents.MARKERS)
def test_measure_text_with_end_of_text_marker_warns(workplace, caplog, marker):
    (workplace / "a.txt").write_text("".join(f"{STORY}{i}\n{marker}\n" for i in range(300)))
    build.measure(configured(FilesCorpus, path="a.txt"))
    warning = next(r.message for r in caplog.records if r.levelname == "WARNING")
    assert warning.startswith(f"{marker} stands 300 times in the text, first in a.txt, and is trained on as text")
    assert warning.endswith(f"data.document='{marker}'")
    caplog.clear()
    build.measure(configured(FilesCorpus, path="a.txt", document=marker))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
