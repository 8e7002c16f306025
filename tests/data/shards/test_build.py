"""Shard builds: the same bytes for any threads, parts and kills; bounded memory; full disks."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from common.errors import UserError
from common.lock import lock
from data.shards import build
from data.shards.document_index import index_path
from data.shards.prepare import prepare
from data.sources.files import FilesCorpus
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteConfig
from tests.support import ROOT, configured

CORPUS, CONFIG = configured(SyntheticCorpus, size=60), configured(BPEConfig, vocab_size=300)
# The same for a process of its own, in which this module would import much that it needs not.
MADE = (
    "from data.sources.synthetic import SyntheticCorpus; from data.tokenizers.bpe import BPEConfig;"
    f"CORPUS, CONFIG = SyntheticCorpus(**{CORPUS.model_dump()!r}), BPEConfig(**{CONFIG.model_dump()!r});"
)
PART = 2000  # bytes: about fifteen parts of the corpus above


@pytest.fixture
def expected(tmp_path):
    return contents(prepare(CORPUS, CONFIG, tmp_path / "in one part"))


def contents(made) -> list:
    """Hash, tokens and indices of prepared documents, however they are divided into shards."""
    tokens = [stream.read(0, len(stream)).tolist() for stream in (made.train, made.val)]
    names = [index_path(made.folder, split).read_text() for split in build.SPLITS]
    return [made.tokenizer.hash, *tokens, *names]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("text", ["some words\n\n',\n\n  in lines\n", "漢字"], ids=["cuts", "none"])
def test_prepare_file_read_in_parts_gives_tokens_of_whole_text(text, workplace, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (workplace / name).write_text(text * 60)
    config = configured(BPEConfig, vocab_size=300)
    whole = prepare(configured(FilesCorpus, path="*.txt"), config, workplace / "whole")
    monkeypatch.setattr("data.sources.files.PART_BYTES", 100)
    monkeypatch.setattr(build, "PART_BYTES", 350)
    parts = prepare(configured(FilesCorpus, path="*.txt"), config, workplace / "parts")
    assert len([*parts.folder.glob("train_*.tokens")]) > 1 or text == "漢字"  # which is one unbroken word
    if text != "漢字":
        assert contents(parts) == contents(whole)
        return
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    first = next(
        configured(FilesCorpus, path="a.txt").documents("train")
    ).text  # one word: of its parts others are merged
    tokens = parts.train.read(0, len(parts.train)).tolist()
    expected = [parts.tokenizer.end_of_text, *parts.tokenizer.encode(first).tolist()]
    assert tokens[: len(expected)] == expected and len(tokens) == 2 * len(expected)


def test_build_any_number_of_workers_gives_same_bytes(workplace, monkeypatch, expected):
    monkeypatch.setattr(build, "PART_BYTES", PART)
    monkeypatch.setattr(build, "BATCH_BYTES", 700)
    found = []
    for workers in (1, 2, 5):
        folder = workplace / "cache" / str(workers)
        folder.parent.mkdir(exist_ok=True)
        build.build(CORPUS, CORPUS.fingerprint(), CONFIG, folder, build.measure(CORPUS), workers)
        found.append(files(folder))
    assert found[0] == found[1] == found[2]
    assert len([name for name in found[0] if name.startswith("train_0")]) > 5
    assert contents(prepare(CORPUS, CONFIG, workplace / "other")) == expected


def test_prepare_after_interrupt_continues_after_last_finished_part(workplace, monkeypatch, expected):
    monkeypatch.setattr(build, "PART_BYTES", PART)
    writing, encoded = build.ShardWriter.close, []

    def stop_at_part_4(writer, last):
        if writer.shards == 4:
            raise KeyboardInterrupt
        writing(writer, last)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build.ShardWriter, "close", stop_at_part_4)
        prepare(CORPUS, CONFIG, workplace / "cache")
    (parts,) = (workplace / "cache").glob(".parts-*")
    assert sorted(path.name for path in parts.iterdir()) == [*(f"part_0000{i}" for i in range(4)), "tokenizer.json"]
    monkeypatch.setattr(BPEConfig, "train", None)  # not needed any more
    encode = build._encode_batch
    monkeypatch.setattr(build, "_encode_batch", lambda t, batch: encoded.extend(batch) or encode(t, batch))
    made = prepare(CORPUS, CONFIG, workplace / "cache")
    assert contents(made) == expected
    assert 0 < len(encoded) < 50
    assert not parts.exists()


def test_prepare_after_kill_at_any_sync_gives_same_bytes(workplace, monkeypatch, expected):
    code = (
        "import os, signal, sys; from pathlib import Path; from common import atomic_io; from data.shards import build;"
        f"from data.shards.prepare import prepare; {MADE}"
        f"build.PART_BYTES = {PART}; fsync = atomic_io._sync; left = iter(range(int(sys.argv[1]), -1, -1));"
        "atomic_io._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL) if next(left) == 0 else fsync(path);"
        "prepare(CORPUS, CONFIG, Path('cache'))"
    )
    environment, kept = os.environ | {"PYTHONPATH": str(ROOT)}, 0
    for syncs in (3, 30):
        process = subprocess.run([sys.executable, "-c", code, str(syncs)], env=environment, stderr=subprocess.DEVNULL)
        assert process.returncode == -signal.SIGKILL
        done = len(list(workplace.glob("cache/.parts-*/part_*")))
        assert done >= kept and not list(workplace.glob("cache/[!.]*"))
        kept = done
    assert kept > 3
    monkeypatch.setattr(build, "PART_BYTES", PART)
    assert contents(prepare(CORPUS, CONFIG, workplace / "cache")) == expected
    assert [path.name[0] for path in sorted((workplace / "cache").iterdir())] == [".", "s"]  # the lock, the shards


def test_prepare_removes_abandoned_parts_of_other_builds(workplace, monkeypatch, caplog):
    """Builds in progress and recent parts are untouched."""
    caplog.set_level("INFO")
    cache, old = workplace / "cache", time.time() - (build.MAX_IDLE_DAYS + 1) * 86400
    for name, touched in {"old": old, "held": old, "young": time.time()}.items():
        parts = cache / f".parts-{build.PART_BYTES}-synthetic-byte-{name}"
        (parts / "part_00000").mkdir(parents=True)
        os.utime(parts, (touched, touched))
    (cache / ".writing-synthetic-byte-old-0a1b").mkdir()
    (cache / ".parts-list").mkdir()  # not ours
    os.utime(cache / ".parts-list", (old, old))
    with lock(build.lock_file(cache / "synthetic-byte-held"), "held"):
        prepare(CORPUS, CONFIG, cache)
    assert {path.name.rpartition("-")[2] for path in cache.glob(".parts-*")} == {"held", "young", "list"}
    assert not list(cache.glob(".writing-*"))
    (line,) = (record.message for record in caplog.records if "removed" in record.message)
    assert "synthetic-byte-old" in line and f"left for {build.MAX_IDLE_DAYS + 1} days" in line


def test_prepare_removes_parts_left_after_finished_build(workplace):
    made = prepare(configured(SyntheticCorpus, size=20), configured(ByteConfig), workplace / "cache")
    left = workplace / f"cache/.parts-2000-{made.folder.name}"
    other = workplace / f"cache/.parts-2000-{made.folder.name}-of-another"
    for folder in (left, other):
        (folder / "part_00000").mkdir(parents=True)
    prepare(configured(SyntheticCorpus, size=20), configured(ByteConfig), workplace / "cache")
    assert not left.exists() and other.exists()


def test_build_failed_with_unlistable_parts_keeps_them(workplace, monkeypatch):
    monkeypatch.setattr(build, "PART_BYTES", PART)

    def unlisted(folder):
        raise OSError(errno.EIO, "Input/output error")

    def fail(*_):
        monkeypatch.setattr(build, "names_in", unlisted)
        raise UserError("a document cannot be read")

    monkeypatch.setattr(build, "_assemble", fail)
    with pytest.raises(UserError, match="a document cannot be read"):
        prepare(CORPUS, CONFIG, workplace / "cache")
    assert len(list((workplace / "cache").glob(".parts-*/part_*"))) > 5


def test_build_on_full_disk_keeps_finished_parts(workplace, monkeypatch, expected):
    monkeypatch.setattr(build, "PART_BYTES", PART)
    write, written = build.ShardWriter.write, []

    def full(writer, tokens):
        written.append(len(tokens))
        if sum(written) > 8000:
            raise OSError(28, "No space left on device")
        write(writer, tokens)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device") as caught:
        patch.setattr(build.ShardWriter, "write", full)
        prepare(CORPUS, CONFIG, workplace / "cache")
    assert str(caught.value).endswith("make room and run again; finished parts are kept")
    assert list(workplace.glob("cache/.parts-*/part_*")) and not list(workplace.glob("cache/.parts-*/.writing*"))
    assert not list(workplace.glob("cache/[!.]*"))
    assert contents(prepare(CORPUS, CONFIG, workplace / "cache")) == expected


def test_build_on_full_disk_before_a_part_is_finished_does_not_promise_one(workplace, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "atomic_folder", full)
    monkeypatch.setattr(build, "discard_parts", lambda folder: None)  # as where they cannot be removed
    with pytest.raises(UserError, match=r"No space left on device: make room and run again$"):
        prepare(CORPUS, CONFIG, workplace / "cache")
    assert list(workplace.glob("cache/.parts-*"))


def test_build_damaged_part_raises_error_with_its_path(workplace, monkeypatch):
    monkeypatch.setattr(build, "PART_BYTES", PART)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(CORPUS, CONFIG, workplace / "cache")
    part = next(workplace.glob("cache/.parts-*/part_00002/train_00002.tokens"))
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"part_00002/train_00002\.tokens is .* delete the folder"):
        prepare(CORPUS, CONFIG, workplace / "cache")


def test_build_without_hard_links_copies_shards(workplace, monkeypatch, expected):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert contents(prepare(CORPUS, CONFIG, workplace / "cache")) == expected


@pytest.mark.parametrize("documents", [1000, 1])
@pytest.mark.parametrize("train_bytes", [2**16, 10**9])
def test_build_trains_tokenizer_on_sample_of_whole_corpus(train_bytes, documents, monkeypatch, workplace):
    """For many short documents and for a long one."""
    heard, train = [], BPEConfig.train
    monkeypatch.setattr(BPEConfig, "train", lambda self, texts: train(self, (heard.append(t) or t for t in texts)))
    lines = [f"{i} {'abcdefgh'[i % 8]}{i * i}\n" for i in range(20_000)]
    size = len(lines) // documents
    for n in range(documents):
        (workplace / f"{n:04}.txt").write_text("".join(lines[n * size : (n + 1) * size]))
    corpus = configured(FilesCorpus, path="*.txt")
    made = prepare(corpus, configured(BPEConfig, vocab_size=300, train_bytes=train_bytes), workplace / "cache")
    text = "".join(document.text for document in corpus.documents("train"))
    if train_bytes == 10**9:
        assert "".join(heard) == text
    else:
        assert train_bytes / 3 < sum(map(len, heard)) < 3 * train_bytes < len(text)
        assert text.index(heard[-1]) > len(text) * 2 / 3
    assert made.tokenizer.vocab_size == 300


LARGE = """
import resource
from pathlib import Path
from data.shards import build
from data.shards.prepare import prepare
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.byte import ByteConfig

class Endless(SyntheticCorpus):  # half a megabyte of text per document, made as it is read
    def read(self):
        for document in super().read():
            yield document._replace(text=document.text[:500] * 1300)

build.PART_BYTES = 2**22
small, large = (Endless(size=size, seed=0) for size in (10, 100))
prepare(small, ByteConfig(), Path("first"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = prepare(large, ByteConfig(), Path("second"))
print(len(made.train), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


def test_prepare_large_corpus_uses_bounded_memory(workplace):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True, check=True)
    tokens, megabytes = map(float, found.stdout.split())
    assert tokens > 40e6 and megabytes < 32


def test_prepare_document_in_several_parts_has_one_end_of_text(workplace, monkeypatch):
    monkeypatch.setattr("data.sources.files.PART_BYTES", 256)
    monkeypatch.setattr(build, "PART_BYTES", 1000)
    for name in "ab":
        (workplace / f"{name}.txt").write_text(f"a line of {name}\n" * 400)
    made = prepare(configured(FilesCorpus, path="*.txt"), configured(ByteConfig), workplace / "cache")
    tokens = made.train.read(0, len(made.train))
    assert (np.flatnonzero(tokens == 256) == [0, 1 + 361 * 12]).all()
    assert len(made.train.shards) > 5 and made.training_documents([(4000, 5000)]) == ["a.txt", "b.txt"]


def test_prepare_bad_last_document_raises_before_encoding(workplace, monkeypatch):
    (workplace / "a.jsonl").write_text('{"text": "x"}\n' * 500 + "{\n")
    monkeypatch.setattr(build, "build", None)
    with pytest.raises(UserError, match=r"a\.jsonl:501 is not JSON"):
        prepare(configured(FilesCorpus, path="a.jsonl"), configured(BPEConfig, vocab_size=300), workplace / "cache")
    assert not (workplace / "cache").exists()
