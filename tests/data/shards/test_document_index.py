"""The document index: names for a few tokens among hundreds of thousands of documents, without reading all of it."""

import bisect
import io
import json
import random

import pytest

from data.shards import document_index as index

DOCUMENTS = 200_000
SPANS = 50


class Counted(io.FileIO):
    """A file that counts the bytes read from it."""

    taken = 0

    def readinto(self, buffer) -> int:
        read = super().readinto(buffer)
        self.taken += read
        return read


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """An index, and its documents of different lengths, some with long and strange names."""
    draw, start, documents = random.Random(0), 0, []
    path = index.index_path(tmp_path_factory.mktemp("corpus"), "train")
    for i in range(DOCUMENTS):
        documents.append((start, f"rows/ü\n{'long ' * 300}{i}" if i % 1000 == 7 else f"rows/{i}"))
        start += draw.choice((1, 2, 30, 5000))
    path.write_text("".join(index.index_entry(*document) for document in documents))
    return path, documents, start


def found_by_reading_all(documents, spans):
    starts = [start for start, _ in documents]
    chosen = set()
    for start, stop in spans:
        chosen |= set(range(bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, stop)))
    return [documents[i][1] for i in sorted(chosen)]


def spans_of(documents, total):
    draw = random.Random(1)
    starts = [start for start, _ in draw.sample(documents, SPANS)]
    anywhere = [(start, start + draw.choice((1, 64, 4097))) for start in draw.sample(range(total - 5000), SPANS)]
    edges = [(starts[0], starts[0] + 1), (starts[1] - 1, starts[1]), (starts[2] - 1, starts[2] + 1)]
    return [*anywhere, *edges, (0, 1), (0, 200), (total - 1, total), (total - 9000, total)]


def test_document_names_equal_those_of_full_scan(corpus):
    path, documents, total = corpus
    spans = spans_of(documents, total)
    with path.open("rb", buffering=index.READ_BYTES) as file:
        assert index.document_names(file, path.stat().st_size, spans) == found_by_reading_all(documents, spans)
        for span in spans:
            assert index.document_names(file, path.stat().st_size, [span]) == found_by_reading_all(documents, [span])


def test_document_names_of_one_span_reads_few_bytes(corpus, monkeypatch):
    path, documents, total = corpus
    decoded, loads = [], json.loads
    monkeypatch.setattr(index.json, "loads", lambda text: decoded.append(text) or loads(text))
    raw, size = Counted(path), path.stat().st_size
    with io.BufferedReader(raw, index.READ_BYTES) as file:
        (name,) = index.document_names(file, size, [(total // 3, total // 3 + 1)])
    assert name == found_by_reading_all(documents, [(total // 3, total // 3 + 1)])[0]
    assert size > 3e6 and len(decoded) < 30
    assert raw.taken < 30 * (2 * index.READ_BYTES + 2000)  # lines of 1600 bytes are among those met


def test_document_names_damaged_index_raises_documented_errors(tmp_path):
    path = tmp_path / "train_documents.jsonl"
    for content in (b"", b'[0, "a"]\n[5, "b', b"{}\n", b"[]\n", b"7\n", b"\xff\n"):
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises((OSError, ValueError, TypeError)):
            index.document_names(file, len(content), [(6, 7)])
