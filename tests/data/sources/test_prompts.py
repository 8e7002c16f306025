"""Pairs of a prompt and an answer: the answer and its end are what is counted, in training and in validation."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from common.errors import UserError
from data.batches import TrainingBatches, check_split_lengths, evaluation_batches
from data.shards import build
from data.shards.prepare import Prepared, prepare
from data.sources.contents import Contents
from data.sources.files import FilesCorpus
from data.sources.mix import MixCorpus, Part
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteConfig
from tests.support import configured

END = 256  # of a text, in bytes
PAIRS = [(f"What is {i} and {i}?", f"{2 * i}, ünï") for i in range(300)]
ROWS = [{"question": question, "answer": answer, "n": i} for i, (question, answer) in enumerate(PAIRS)]
T = 64


@pytest.fixture
def pairs(workplace):
    (workplace / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return workplace


def write_table(path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)


def corpus(**settings) -> FilesCorpus:
    return configured(FilesCorpus, **({"path": "a.jsonl", "prompt": "question", "column": "answer"} | settings))


def made(folder, tokenizer=ByteConfig, **settings) -> Prepared:
    return prepare(corpus(**settings), configured(tokenizer), folder / "cache")


def counted_text(batches) -> bytes:
    """The counted targets, in order, with | for an end of text."""
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    return b"".join(b"|" if t == END else bytes([t]) for t in targets[targets >= 0].tolist())


def expected_text(documents) -> bytes:
    """What is counted of the answers: each, and its end but for the last."""
    return b"|".join(document.text[document.prompt :].encode() for document in documents)


@pytest.mark.parametrize("length", [16, T])
def test_prompts_answers_and_their_ends_are_counted(pairs, length):
    found = made(pairs)
    documents = list(corpus().read())
    assert [d.text for d in documents] == [f"{question}\n{answer}" for question, answer in PAIRS]
    for split, stream in (("train", found.train), ("val", found.val)):
        expected = expected_text(d for d in documents if d.split == split)
        batches = [read() for read in evaluation_batches(stream, length, 5)]
        counted = counted_text(batches)
        assert expected.startswith(counted) and len(expected) - len(counted) < length
    steps = TrainingBatches(found.train, length, 0, 8, 4)
    inputs, targets, *_ = steps.read(0)
    following = torch.cat([inputs[:, 1:], targets[:, -1:]], 1)
    assert targets.shape == (8, length) and ((targets == -1) | (targets == following)).all()
    assert 0 < (targets >= 0).float().mean() < 0.6


def test_prompts_are_encoded_by_themselves(pairs):
    found = made(pairs, BPEConfig)
    encode = found.tokenizer.encode
    tokens, marks = (stream.read(0, 200).tolist() for stream in (found.train, found.train.counted))
    expected, counts = [], []
    for document in corpus().documents("train"):
        parts = encode(document.text[: document.prompt]), encode(document.text[document.prompt :])
        expected += [found.tokenizer.end_of_text, *parts[0], *parts[1]]
        counts += [1, *[0] * len(parts[0]), *[1] * len(parts[1])]
    assert expected[:200] == tokens and counts[:200] == marks


def test_prompts_of_packed_documents_see_their_own_answer_alone(pairs):
    batch = evaluation_batches(made(pairs).train, T, 4, document_start=END)[0]()
    assert torch.equal(batch.docs[0], (batch.inputs[0] == END).cumsum(0)) and (batch.targets == -1).any()


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "json"])
def test_prompts_of_any_table_are_those_of_json_lines(pairs, kind):
    write_table(pairs / f"b.{kind}", ROWS)
    assert [d[1:] for d in corpus(path=f"b.{kind}").read()] == [d[1:] for d in corpus().read()]


def test_prompts_end_as_asked_for(pairs):
    for prompt_end, meant in (("", ""), ("\\n\\n", "\n\n"), (" Answer: ", " Answer: ")):
        first = next(corpus(prompt_end=prompt_end).read())
        assert first.text[: first.prompt] == PAIRS[0][0] + meant


def test_prompts_same_question_is_in_one_split(pairs):
    rows = [{"question": f"q{i % 100}", "answer": f"a{i}"} for i in range(600)]
    (pairs / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = [{d.text[: d.prompt] for d in corpus().documents(split)} for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 100


LACK = "rows have no prompt (column question) or no answer (column answer)"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_prompts_rows_without_both_are_skipped_and_counted(pairs, kind):
    rows = [{"question": q, "answer": a} for q, a in (("q", ""), (None, "a"), ("", "a"), ("q", None), ("q", "a"))]
    if kind in ("jsonl", "json"):
        rows[1:1] = [{"answer": "a"}, {"question": "q"}, {"n": 3}]
    write_table(pairs / f"b.{kind}", rows)
    found, one = Contents(), corpus(path=f"b.{kind}")
    one.fingerprint()
    assert [(d.name, d.text) for d in found.documents_of(one)] == [(f"b.{kind}:{len(rows)}", "q\na")]
    assert found.summary(1) == f"1 file, 1 document; {len(rows) - 1} of {len(rows)} {LACK}: skipped"
    write_table(pairs / f"b.{kind}", rows[:-1])
    with pytest.raises(UserError, match=re.escape(f"has no documents, as all {len(rows) - 1} {LACK}: name other col")):
        prepare(one, configured(ByteConfig), pairs / "cache")
    assert not list(pairs.glob("cache/[!.]*"))


def test_prompts_in_any_number_of_parts_give_the_same_marks(pairs, monkeypatch):
    whole = made(pairs)
    monkeypatch.setattr(build, "PART_BYTES", 800)
    parts = prepare(corpus(), configured(ByteConfig), pairs / "other")
    assert len([*parts.folder.glob("counted_train_*.tokens")]) > 5
    for before, now in ((whole.train, parts.train), (whole.val, parts.val)):
        for old, new in ((before, now), (before.counted, now.counted)):
            assert np.array_equal(old.read(0, len(old)), new.read(0, len(new)))
    again = made(pairs)
    assert len(again.train.counted) == len(again.train)


def test_prompts_beside_text_that_all_counts(pairs):
    text = configured(SyntheticCorpus, size=50)
    mix = configured(MixCorpus, parts={n: Part(quota=1, corpus=c) for n, c in {"a": corpus(), "b": text}.items()})
    found = prepare(mix, configured(ByteConfig), pairs / "cache")
    marks, tokens = (s.read(0, len(s)) for s in (found.train.counted, found.train))
    expected = []
    for d in mix.documents("train"):
        expected += [1, *[0] * len(d.text[: d.prompt].encode()), *[1] * len(d.text[d.prompt :].encode())]
    assert marks.tolist() == expected and 0 < (marks == 0).sum() < len(tokens) / 2
    assert prepare(text, configured(ByteConfig), pairs / "cache").train.counted is None


def test_prompts_change_no_key_of_text_without(pairs):
    key = corpus(prompt=None).cache_key()
    assert not {"prompt", "prompt_end"} & set(key)
    keys = [corpus().cache_key(), corpus(prompt_end="").cache_key(), corpus(prompt="n").cache_key(), key]
    assert all(keys.count(one) == 1 for one in keys)


def test_prompts_with_other_ends_are_no_parts_of_one_mix(pairs):
    for other, refused in (({"prompt_end": " "}, True), ({}, False)):
        parts = {"a": Part(quota=1, corpus=corpus()), "b": Part(quota=1, corpus=corpus(**other))}
        mix = configured(MixCorpus, parts=parts)
        if refused:
            with pytest.raises(UserError, match="would train on what the other holds out"):
                mix.fingerprint()
        else:
            mix.fingerprint()


def test_prompts_marks_missing_raise_error(pairs):
    found = made(pairs)
    for path in found.folder.glob("counted_val_*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no counted_val shard: delete the folder"):
        made(pairs)


def test_prompts_without_any_answer_to_evaluate_raise_error(pairs):
    rows = [{"question": f"{i} " + "long " * 100, "answer": "a"} for i in range(50)]
    (pairs / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = made(pairs)
    check_split_lengths(found, T)
    with pytest.raises(UserError, match="every token of the first eval_tokens of the validation split is of a prompt"):
        check_split_lengths(found, T, eval_tokens=2 * T)


MISFITS = [
    ({"prompt": "body"}, "a.jsonl has no column body, it has question, answer, n: give one as data.prompt="),
    ({"prompt": "n"}, "holds int in column n, not text: choose a column of strings as data.prompt="),
    ({"path": "a.txt", "column": None}, "data.prompt=question does not fit a.txt, which is no table"),
    ({"document": "line"}, "a table: choose row"),
]


def test_prompts_that_do_not_fit_raise_error(pairs):
    (pairs / "a.txt").write_text("words\n")
    for settings, complaint in MISFITS:
        with pytest.raises(UserError, match=complaint):
            one = corpus(**settings)
            one.fingerprint()
            list(one.read())
    with pytest.raises(ValueError, match=r"data\.prompt=text is the column of the text too"):
        corpus(prompt="text", column=None)
