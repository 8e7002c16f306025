"""Shards are complete or rejected; batches use each token once per epoch, for any batch size."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.batches import (
    Batch,
    TrainingBatches,
    check_split_lengths,
    count_windows,
    document_positions,
    documents_of_step,
)
from data.shards import token_files
from data.shards.prepare import prepare
from data.shards.token_files import HEADER_BYTES, ShardWriter, TokenStream, open_shard, open_stream
from data.sources.files import FilesCorpus
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteConfig
from tests.support import ROOT, configured

T = 16


def write(folder, tokens, shard_tokens=100):
    writer = ShardWriter(folder, "train", np.uint16, "hash", shard_tokens)
    for part in np.array_split(tokens, 7):
        writer.write(part)
    writer.close()


@pytest.fixture
def stream(tmp_path):
    write(tmp_path, np.arange(1000))
    return open_stream(tmp_path, "train", "hash")


def test_stream_of_several_shards_reads_as_one(stream):
    assert len(stream.shards) == 10
    assert len(stream) == 1000
    for start, count in ((0, 1000), (99, 2), (100, 100), (250, 333), (999, 1)):
        assert stream.read(start, count).tolist() == list(range(start, start + count))


def test_stream_read_each_equals_reading_one_after_another(stream):
    starts = [700, 99, 0, 383, 99]  # two of which span shards
    parts = list(stream.read_each(iter(starts), 17))
    assert [part.tolist() for part in parts] == [stream.read(start, 17).tolist() for start in starts]
    arrays = TokenStream([np.arange(90), np.arange(90, 200)])
    assert [part.tolist() for part in arrays.read_each([80, 0], 20)] == [list(range(80, 100)), list(range(20))]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such hint elsewhere")
def test_stream_read_each_announces_all_before_it_reads_any(stream, monkeypatch):
    calls = []
    read_at = token_files.read_at
    monkeypatch.setattr("os.posix_fadvise", lambda file, place, count, _: calls.append(("announced", place, count)))
    monkeypatch.setattr(token_files, "read_at", lambda file, *of: calls.append(("read", *of)) or read_at(file, *of))
    list(stream.read_each([700, 95], 10))  # of one shard, and of two
    places = [(HEADER_BYTES, 20), (HEADER_BYTES + 190, 10), (HEADER_BYTES, 10)]
    assert calls == [(what, *place) for what in ("announced", "read") for place in places]


def test_stream_read_each_without_the_hint_reads_the_same(stream, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.posix_fadvise", refuse)
    (part,) = stream.read_each([95], 10)
    assert part.tolist() == list(range(95, 105))


@pytest.mark.parametrize("damage", ["truncate", "flip token", "flip header", "magic", "empty", "append"])
def test_open_shard_damaged_raises_error_with_path(tmp_path, damage):
    write(tmp_path, np.arange(500), shard_tokens=1000)
    path = tmp_path / "train_00000.tokens"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-10]
    elif damage == "flip token":
        content[HEADER_BYTES + 101] ^= 4
    elif damage == "flip header":
        content[20] ^= 0x80
    elif damage == "magic":
        content[0] ^= 1
    elif damage == "append":
        content += b"xx"
    else:
        content = bytearray()
    path.write_bytes(content)
    with pytest.raises(UserError, match="train_00000") as caught:
        open_shard(path, "hash")
    assert "rebuild" in str(caught.value)


def test_open_stream_missing_shard_raises_error(stream, tmp_path):
    for missing in ("train_00009.tokens", "train_00004.tokens"):  # the last, and one amid the others
        (tmp_path / missing).unlink()
        with pytest.raises(UserError, match="is missing"):
            open_stream(tmp_path, "train", "hash")


def test_open_shard_under_another_name_raises_error(tmp_path):
    write(tmp_path, np.arange(250))
    for taken_for in ("train_00000.tokens", "train_00002.tokens", "val_00000.tokens"):
        shutil.copy(tmp_path / "train_00001.tokens", tmp_path / taken_for)
        with pytest.raises(UserError, match=r"holds what was written as train_00001\.tokens"):
            open_shard(tmp_path / taken_for, "hash")


def test_open_shard_of_other_tokenizer_raises_error(tmp_path):
    write(tmp_path, np.arange(10))
    with pytest.raises(UserError, match="another tokenizer"):
        open_stream(tmp_path, "train", "other")


def sequences(stream: TokenStream, seed: int, first: int, count: int, document_start: int | None = None) -> Batch:
    """`count` of them in one step, the first of which is `first`, a multiple of it."""
    batches = TrainingBatches(stream, T, seed, count, count, document_start)
    return batches.of_step(first // count, torch.device("cpu"))[0]


def test_training_batches_epoch_predicts_every_token_once_and_drops_tail(stream):
    n = count_windows(stream, T)
    assert n == (1000 - 1) // T
    batch = sequences(stream, seed=0, first=0, count=n)
    assert sorted(batch.targets.flatten().tolist()) == list(range(1, n * T + 1))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    again = sequences(stream, seed=0, first=n, count=n).inputs
    assert sorted(again.flatten().tolist()) == sorted(batch.inputs.flatten().tolist())
    assert not torch.equal(again, batch.inputs)  # another epoch, another order
    assert not torch.equal(sequences(stream, seed=1, first=0, count=n).inputs, batch.inputs)


def test_training_batches_order_is_fixed(stream):
    first = [int(row[0]) // T for row in sequences(stream, seed=0, first=0, count=8).inputs]
    assert first == [28, 54, 24, 15, 0, 50, 61, 11]


def test_micro_batches_of_any_size_give_consecutive_sequences(stream):
    whole = sequences(stream, seed=3, first=0, count=24, document_start=9)
    for micro_batch in (1, 4, 12):
        batches = TrainingBatches(stream, T, 3, 12, micro_batch, document_start=9)
        parts = [part for step in (0, 1) for part in batches.of_step(step, torch.device("cpu"))]
        assert all(len(part.inputs) == micro_batch for part in parts)
        for column in Batch._fields:
            assert torch.equal(torch.cat([getattr(part, column) for part in parts]), getattr(whole, column))


def test_prepare_again_finds_shards(workplace):
    corpus, config = configured(SyntheticCorpus, size=20), configured(BPEConfig, vocab_size=300)
    first = prepare(corpus, config, workplace / "cache")
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = prepare(corpus, config, workplace / "cache")
    assert again.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == written
    assert [path.name for path in (workplace / "cache").glob("[!.]*")] == [first.folder.name]
    assert prepare(corpus, configured(ByteConfig), workplace / "cache").folder != first.folder


def test_prepare_vocabulary_larger_than_text_yields_warns_each_time(workplace, caplog):
    corpus = configured(SyntheticCorpus, size=20)
    for _ in range(2):
        made = prepare(corpus, configured(BPEConfig, vocab_size=5000), workplace / "cache")
        (reported,) = [record.message for record in caplog.records if "vocab_size" in record.message]
        assert reported.startswith(
            f"tokenizer.vocab_size=5000: the training text yields {made.tokenizer.vocab_size} tokens"
        )
        caplog.clear()
    prepare(corpus, configured(BPEConfig, vocab_size=300), workplace / "cache")
    assert not caplog.records or "vocab_size" not in caplog.text


def test_prepare_puts_end_of_text_before_each_document(workplace):
    corpus = configured(SyntheticCorpus, size=20)
    made = prepare(corpus, configured(ByteConfig), workplace / "cache")
    for split, stream in (("train", made.train), ("val", made.val)):
        expected = []
        for document in corpus.documents(split):
            expected += [256, *document.text.encode()]
        assert stream.read(0, len(stream)).tolist() == expected


@pytest.mark.parametrize("fault", ["tokenizer", "killed"])
def test_prepare_after_failed_build_starts_clean(workplace, monkeypatch, fault):
    corpus = configured(SyntheticCorpus, size=20)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "data.shards.build._encode" if fault == "killed" else "data.tokenizers.byte.ByteConfig.train", fail
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, configured(ByteConfig), workplace / "cache")
    assert all(path.name.endswith(".lock") for path in (workplace / "cache").iterdir())


def test_prepare_tokenizer_not_of_shards_raises_error(workplace):
    corpus = configured(SyntheticCorpus, size=20)
    made = prepare(corpus, configured(BPEConfig, vocab_size=300), workplace / "cache")
    configured(BPEConfig, vocab_size=290).train(["other text " * 50]).save(made.folder / "tokenizer.json")
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(corpus, configured(BPEConfig, vocab_size=300), workplace / "cache")


def test_check_split_lengths_too_little_text_raises_error(workplace):
    (workplace / "a.txt").write_text("a short text\n" * 12)
    made = prepare(configured(FilesCorpus, path="a.txt"), configured(ByteConfig), workplace / "cache")
    with pytest.raises(UserError, match="validation split holds 14 tokens"):
        check_split_lengths(made, 32)


def test_prepare_text_of_too_few_bytes_for_a_window_is_refused_before_anything_is_built(workplace):
    (workplace / "a.txt").write_text("a short text\n" * 12)
    corpus = configured(FilesCorpus, path="a.txt")
    with pytest.raises(UserError, match=r"the validation split holds 13 bytes, one window .*=14 takes 15 tokens: give"):
        prepare(corpus, configured(BPEConfig, vocab_size=300), workplace / "cache", window=15)
    assert not (workplace / "cache").exists()
    made = prepare(corpus, configured(ByteConfig), workplace / "cache", window=14)
    assert len(made.val) == 14  # as many as the bytes allow


def test_prepare_unwritable_cache_folder_raises_user_error(workplace):
    (workplace / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache_dir=.*: give a folder to write to as cache_dir="):
        prepare(configured(SyntheticCorpus, size=20), configured(ByteConfig), workplace / "cache")


def test_document_positions_of_packed_documents():
    tokens = torch.tensor([[5, 6, 9, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 6]])
    positions, docs = document_positions(tokens, document_start=9)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert docs.tolist() == [[0, 0, 1, 1, 2, 3, 3], [1] * 7]


def test_count_windows_of_empty_stream_is_zero():
    assert count_windows(TokenStream([np.array([], np.uint16)]), 4) == 0


@pytest.mark.parametrize("change", ["cut", "edit"])
def test_shard_changed_while_open_raises_user_error(stream, tmp_path, change):
    path = tmp_path / "train_00003.tokens"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-10] if change == "cut" else content)
    assert stream.read(0, 300).tolist() == list(range(300))
    with pytest.raises(UserError, match=r"train_00003\.tokens has changed while it was in use"):
        stream.read(290, 20)


def test_shard_unreadable_raises_user_error_without_rebuild(stream, tmp_path, monkeypatch):
    class Failing:
        def fileno(self):
            raise OSError(errno.EIO, "Input/output error")

    stream.shards[3].file = Failing()
    with pytest.raises(UserError, match=r"train_00003.tokens cannot be read: Input/output error; what was"):
        stream.read(250, 100)
    monkeypatch.setattr("os.listdir", lambda _: Failing().fileno())
    with pytest.raises(UserError, match="cannot be read: Input/output error") as refused:
        open_stream(tmp_path, "train", "hash")
    assert "delete" not in str(refused.value)


def test_documents_of_step_are_found_by_their_tokens(workplace):
    (workplace / "a.txt").write_text("a line of the first\n" * 50)
    (workplace / "b.txt").write_text("a line of the second\n" * 50)
    made = prepare(configured(FilesCorpus, path="*.txt"), configured(ByteConfig), workplace / "cache")
    second = made.train.read(0, len(made.train)).tolist().index(256, 1)  # its end-of-text
    assert made.training_documents([(0, 5)]) == ["a.txt"]
    assert made.training_documents([(second - 1, second)]) == ["a.txt"]
    assert made.training_documents([(second, second + 1)]) == ["b.txt"]
    assert made.training_documents([(second + 9, second + 19), (second - 1, second + 1)]) == ["a.txt", "b.txt"]
    shown = documents_of_step(made, T, seed=0, step=3, sequences=1)
    (row,) = sequences(made.train, seed=0, first=3, count=1).inputs
    assert ["first" in made.tokenizer.decode(row.tolist())] == [name == "a.txt" for name in shown]
    (made.folder / "train_documents.jsonl").unlink()
    assert made.training_documents([(0, 5)]) == []


def test_prepare_removes_leftovers_of_killed_build(workplace):
    corpus = configured(SyntheticCorpus, size=20)
    made = prepare(corpus, configured(ByteConfig), workplace / "cache")
    left = made.folder.with_name(f".writing-{made.folder.name}-abc")
    made.folder.rename(left)
    prepare(corpus, configured(ByteConfig), workplace / "cache")
    assert not left.exists() and made.folder.exists()


def test_prepare_text_changed_while_read_raises_error(workplace, monkeypatch):
    path, read = workplace / "a.txt", FilesCorpus.read
    path.write_text("the old text\n" * 50)

    def meanwhile(self):
        path.write_text("a new text\n" * 50)
        return read(self)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="changed while they were read: run again"):
        patch.setattr(FilesCorpus, "read", meanwhile)
        prepare(configured(FilesCorpus, path="a.txt"), configured(ByteConfig), workplace / "cache")
    path.write_text("the old text\n" * 50)
    made = prepare(configured(FilesCorpus, path="a.txt"), configured(ByteConfig), workplace / "cache")
    assert "new" not in made.tokenizer.decode(made.train.read(0, 500).tolist())


def test_prepare_in_two_processes_builds_once(workplace):
    """The second waits for the first, and uses what it built."""
    code = (
        "import sys, time; from pathlib import Path; import data.shards.prepare as p;"
        "from data.sources.synthetic import SyntheticCorpus; CORPUS = SyntheticCorpus(size=60, seed=0);"
        "from data.tokenizers.byte import ByteConfig; build = p.build;"
        "p.build = lambda *a: (print('building', flush=True), time.sleep(1), build(*a));"
        "p.prepare(CORPUS, ByteConfig(), Path('cache'))"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT}, stdout=subprocess.PIPE) for _ in range(2)]
    reported = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(reported) == [b"", b"building\n"]
