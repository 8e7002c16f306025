"""Examples with right answers: what counts follows from the text before it, and windows are whole examples."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data.batches import Batch, TrainingBatches, count_windows, evaluation_batches
from data.shards.prepare import Prepared, prepare
from data.sources.examples import Draw, ExampleCorpus
from data.sources.mqar import MQARCorpus
from data.sources.needle import NeedleCorpus
from data.sources.string_copy import CopyCorpus
from data.tokenizers.byte import ByteConfig
from data.tokenizers.load import StoredConfig, load_tokenizer
from data.tokenizers.numbers import NumbersConfig
from tests.support import composed_run, configured

CONTEXT = 64
BYTES = 256  # tokens before those of numbers
CORPORA = {"mqar": MQARCorpus, "needle": NeedleCorpus, "copy": CopyCorpus}


def corpus_of(name: str, **given) -> ExampleCorpus:
    return configured(CORPORA[name], **{"size": 100} | given).derive(CONTEXT)


def prepared(corpus: ExampleCorpus, folder: Path) -> Prepared:
    return prepare(corpus, configured(NumbersConfig).derive(corpus.name, corpus.numbers), folder / "cache")


def windows(corpus: ExampleCorpus, made: Prepared) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every validation window as numbers; what does not count is below 0."""
    counted = torch.from_numpy(corpus.counted(CONTEXT))
    batches = [read() for read in evaluation_batches(made.val, CONTEXT, 4, counted=counted)]
    found = Batch(*(torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True)))
    return [(inputs, targets) for inputs, targets in zip(*((part - BYTES).tolist() for part in found[:2]), strict=True)]


def of_mqar(corpus: MQARCorpus, before: list[int]) -> int:
    """What the definition says that comes after these numbers."""
    return before[before.index(before[-1]) + 1]


def of_needle(corpus: NeedleCorpus, before: list[int]) -> int:
    (first, second) = (i for i, number in enumerate(before) if number < corpus.keys)
    assert before[first] == before[second] and second == len(before) - 1
    return before[first + 1]


def of_copy(corpus: CopyCorpus, before: list[int]) -> int:
    separator = before.index(corpus.symbols)
    return before[len(before) - 1 - separator]


@pytest.mark.parametrize("length", [None, 32])
@pytest.mark.parametrize(
    ("name", "answer", "per_example"),
    [("mqar", of_mqar, lambda length: 7), ("needle", of_needle, lambda _: 1), ("copy", of_copy, lambda n: n // 2 - 1)],
)
def test_counted_targets_are_the_answers_and_follow_from_the_text_before(
    tmp_path, name, answer: Callable, per_example: Callable, length
):
    corpus = corpus_of(name, length=length, **({"pairs": 7} if name == "mqar" else {}))
    found = windows(corpus, prepared(corpus, tmp_path))
    assert len(found) == count_windows(prepared(corpus, tmp_path).val, CONTEXT) > 0
    for inputs, targets in found:
        answers = [i for i, target in enumerate(targets) if target >= 0]
        assert len(answers) == CONTEXT // corpus.length * per_example(corpus.length)
        for i in answers:
            before = inputs[i // corpus.length * corpus.length + 1 : i + 1]
            assert targets[i] == answer(corpus, before)


def test_mqar_counts_the_values_of_all_its_pairs_once_each():
    corpus = corpus_of("mqar", pairs=5, keys=6, values=7)
    orders = set()
    for document in corpus.read():
        numbers = [int(word) for word in document.text.split()]
        pairs = [tuple(numbers[i : i + 2]) for i in range(0, 10, 2)]
        asked = [tuple(numbers[i : i + 2]) for i in range(len(numbers) - 10, len(numbers), 2)]
        assert sorted(asked) == sorted(pairs) and len(numbers) == CONTEXT - 1
        assert len({key for key, _ in pairs}) == 5
        assert all(key < 6 <= value < 13 for key, value in pairs) and set(numbers[10:-10]) == {13}
        assert [numbers[i] for i in corpus.answers()] == [value for _, value in asked]
        orders.add(tuple(pairs.index(pair) for pair in asked))
    assert len(orders) > 50


def test_needle_lies_at_every_depth():
    depths = {next(i for i, n in enumerate(document.text.split()) if int(n) < 16)
              for document in corpus_of("needle", length=16, size=2000).read()}  # fmt: skip
    assert depths == set(range(16 - 5 + 1))


@pytest.mark.parametrize("name", CORPORA)
def test_window_is_whole_examples(tmp_path, name):
    corpus = corpus_of(name, length=32, **({"pairs": 4} if name == "mqar" else {}))
    made = prepared(corpus, tmp_path)
    known = {document.text for document in corpus.documents("train")}
    batches = TrainingBatches(made.train, CONTEXT, 3, sequences=40, micro_batch=8)
    for batch in batches.of_step(2, torch.device("cpu")):
        for window in torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1):
            ends = (window == made.tokenizer.end_of_text).nonzero().flatten().tolist()
            assert ends == [0, 32, 64]
            texts = [made.tokenizer.decode(window[i + 1 : i + 32].tolist()) for i in (0, 32)]
            assert known.issuperset(texts)


@pytest.mark.parametrize("name", CORPORA)
def test_examples_hang_on_the_seed_alone_and_those_held_out_are_others(name):
    def texts(split: str, **given) -> list[str]:
        return [document.text for document in corpus_of(name, **given).documents(split)]

    train, val = texts("train"), texts("val")
    assert train == texts("train") and len(train) == 90 and len(val) == 10
    assert not set(train) & set(val) and not set(train) & set(texts("train", seed=1))
    assert corpus_of(name).fingerprint() != corpus_of(name, seed=1).fingerprint()


def test_examples_are_the_same_bytes_everywhere():
    """Stored numbers: another version of Python, or of these rules, would give others."""
    found = {name: hashlib.sha256("".join(d.text for d in corpus_of(name).read()).encode()) for name in CORPORA}
    assert {name: digest.hexdigest()[:16] for name, digest in found.items()} == {
        "mqar": "3239cf62d9bf98fa",
        "needle": "6c151992d1f8f7d0",
        "copy": "c07fe8d76d4870cd",
    }


def test_draw_of_distinct_numbers_gives_every_order_alike():
    draw = Draw("a seed")
    drawn = [tuple(draw.distinct(2, 4)) for _ in range(6000)]
    counts = {pair: drawn.count(pair) for pair in set(drawn)}
    assert len(counts) == 12 and all(420 <= count <= 580 for count in counts.values())
    assert sorted(draw.distinct(50, 50)) == list(range(50))


NUMBERS = ("data=mqar", "tokenizer=numbers", "model.context_length=64", "batch_tokens=1024")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ((*NUMBERS, "data.pairs=0"), "data.pairs=0: give at least 1 and at most"),
        ((*NUMBERS, "data.pairs=9", "data.keys=8"), "data.pairs=9 needs as many different keys, data.keys=8 has fewer"),
        ((*NUMBERS, "data.values=0"), "data.values=0: give at least 1 and at most"),
        ((*NUMBERS, "data.pairs=16"), "data.pairs=16 makes examples of 65 tokens, data.length=64 is less: choose at"),
        ((*NUMBERS, "data.length=40"), "data.length=40 does not divide model.context_length=64, and would cut"),
        ((*NUMBERS, "data.length=128"), "data.length=128 does not divide model.context_length=64, and would cut"),
        ((*NUMBERS, "data.size=19"), "data.size=19: give at least 20"),
        (
            (*NUMBERS, "data.keys=100000"),
            "data=mqar is written in 100009 numbers, tokenizer=numbers has at most 100000",
        ),
        ((*NUMBERS, "tokenizer.size=24"), "tokenizer.size=24 is less than the 25 numbers that data=mqar is written in"),
        ((*NUMBERS, "tokenizer=byte"), "data=mqar is written in numbers, a token each: choose tokenizer=numbers"),
        ((*NUMBERS, "data=synthetic"), "tokenizer=numbers needs tokenizer.size= with text, or data that is written in"),
        ((*NUMBERS, "data=needle", "data.length=4"), "data.length=4 has no room for two pairs and the end of text"),
        ((*NUMBERS, "data=copy", "model.context_length=63", "batch_tokens=630"), "data.length=63 is not the end of"),
        ((*NUMBERS, "data=mix", "data.parts={mqar: 1}"), "data.parts.mqar is data=mqar, whose examples fill whole"),
    ],
)
def test_settings_that_make_no_examples_are_refused_in_one_line(overrides, complaint):
    with pytest.raises(UserError) as error:
        composed_run(*overrides)
    assert str(error.value).startswith(complaint) and "\n" not in str(error.value)


def test_numbers_are_a_token_each_also_when_stored(tmp_path):
    tokenizer = configured(NumbersConfig, size=1234).train(())
    tokenizer.save(tmp_path / "tokenizer.json")
    for one in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        assert one.encode("".join(f" {i}" for i in range(1234))).tolist() == list(range(BYTES, BYTES + 1234))
        text = " 7 what 12345\n08 é 3 4"
        assert one.decode(one.encode(text).tolist()) == text
    assert tokenizer.vocab_size == configured(NumbersConfig, size=1234).max_vocab_size == 256 + 1234 + 1


def test_fine_tuning_on_numbers_needs_a_vocabulary_that_has_them(tmp_path):
    for name, config in (("bytes", configured(ByteConfig)), ("few", configured(NumbersConfig, size=100))):
        config.train(()).save(tmp_path / name)
        stored = StoredConfig(path=str(tmp_path / name), hash=config.train(()).hash)
        with pytest.raises(UserError, match="data=mqar is written in 129 numbers, which are not a token each in"):
            stored.check_numbers("mqar", 129)
    stored.check_numbers("mqar", 100)
    (tmp_path / "few").unlink()
    assert stored.derive("mqar", 129) == stored  # which reads nothing: a run outlives the one that it began with
