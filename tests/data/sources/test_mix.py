"""Mixes: fixed proportions, in an order that depends on the settings alone."""

from itertools import pairwise

import pytest

from data.shards.prepare import prepare
from data.sources.files import FilesCorpus
from data.sources.mix import MixCorpus, Part
from data.sources.row_counts import RowCounts
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.byte import ByteConfig
from tests.support import configured


def mix(**parts) -> MixCorpus:
    return configured(
        MixCorpus, parts={name: Part(quota=quota, corpus=corpus) for name, (quota, corpus) in parts.items()}
    )


@pytest.fixture
def books(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text(f"line of book {i}\n" * 20)
    return configured(FilesCorpus, path=f"{tmp_path}/*.txt")


def test_mix_meets_quotas_at_every_document(books):
    words = configured(SyntheticCorpus, size=100)
    found = [d for d in mix(a=(3, words), b=(1, books)).read() if not d.held_out]
    taken, longest = {"a": 0, "b": 0}, max(len(d.text) for d in found)
    for document in found:
        taken[document.name[0]] += len(document.text)
        assert abs(taken["a"] / 3 - taken["b"]) <= longest
    assert taken["b"] > 4 * longest


def test_mix_keeps_order_and_held_out_documents_of_each_part(books):
    words = configured(SyntheticCorpus, size=30)
    found = list(mix(a=(1, words), b=(100, books)).read())
    for name, corpus in (("a", words), ("b", books)):
        of_part = [d._replace(name=d.name[2:]) for d in found if d.name.startswith(f"{name}/")]
        assert of_part == list(corpus.read())[: len(of_part)]
    assert any(d.held_out for d in found)
    assert sum(d.name.startswith("b/") for d in found) == 120  # all of it, then it ends
    assert sum(d.name.startswith("a/") for d in found) < 30


def test_mix_order_depends_on_settings_only(books):
    words = configured(SyntheticCorpus, size=50)
    first, second = mix(a=(1, words), b=(2, books)), mix(b=(2, books), a=(1, words))
    assert list(first.read()) == list(second.read())
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != mix(a=(2, words), b=(2, books)).fingerprint()
    assert first.fingerprint() != mix(a=(1, configured(SyntheticCorpus, size=50, seed=1)), b=(2, books)).fingerprint()


def test_mix_document_in_parts_stays_together(books, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.files.PART_BYTES", 64)
    found = list(mix(a=(1, configured(SyntheticCorpus, size=30)), b=(1, books)).read())
    for before, document in pairwise(found):
        assert not document.is_continuation or before.name == document.name
    made = prepare(
        mix(a=(1, configured(SyntheticCorpus, size=30)), b=(1, books)), configured(ByteConfig), tmp_path / "cache"
    )
    tokens = made.train.read(0, len(made.train)).tolist()
    assert tokens.count(256) == sum(not d.is_continuation and not d.held_out for d in found)


def test_mix_names_the_part_of_rows_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n{"text": null}\n{"text": null}\n')
    part = configured(FilesCorpus, path=f"{tmp_path}/a.jsonl")
    counts = RowCounts()
    list(mix(a=(1, configured(SyntheticCorpus, size=30)), b=(1, part)).read_counting(counts))
    assert counts.lines() == ["2 of 3 rows have no text (column text) in b"]


def test_mix_invalid_quota_raises_error():
    for quota in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="quota"):
            Part(quota=quota, corpus=configured(SyntheticCorpus))
    with pytest.raises(ValueError, match="names no corpus"):
        configured(MixCorpus, parts={})
