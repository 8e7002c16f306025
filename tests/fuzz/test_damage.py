"""Damaged files: they are read exactly as written, or named in a one-line error."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from common.errors import UserError
from data.shards.prepare import prepare
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from tests.support import assert_one_line, call, configured
from training.metrics_file import read_metrics
from training.run.load import load_run

OPTIONS = [
    "data=synthetic",
    "data.size=20",
    "tokenizer=bpe",
    "tokenizer.vocab_size=300",
    "attention=mla",
    "model.n_layers=1",
    "model.d_model=32",
    "model.n_heads=2",
    "model.context_length=16",
    "batch_tokens=32",
    "eval_tokens=64",
    "steps=4",
    "save_every=1",
    "precision=fp32",
    "tune_malloc=false",
    "run_dir=run",
]
Files = dict[str, bytes]  # contents by path within a folder


KINDS = ("truncate", "flip", "delete", "extend", "overwrite", "cut out", "swap")


class Damage(NamedTuple):
    """From byte `start` of a file, `removed` bytes give way to `inserted`; or all of it to a copy of another file, or
    to nothing at all."""

    kind: str
    file: str
    start: int
    removed: int = 0
    inserted: bytes = b""
    copied: str | None = None


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(folder: Path, files: Files) -> None:
    """Make the folder contain exactly these files, each newly created: an old one may still be memory-mapped."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def damaged(files: Files, damage: Damage) -> Files:
    rest = {name: content for name, content in files.items() if name != damage.file}
    if damage.kind == "delete":
        return rest
    if damage.copied is not None:
        return rest | {damage.file: files[damage.copied]}
    old = files[damage.file]
    return rest | {damage.file: old[: damage.start] + damage.inserted + old[damage.start + damage.removed :]}


@st.composite
def damages(draw, files: Files) -> Damage:
    """A fault in one of these files, often near its beginning or end, where headers are."""
    name, kind = draw(st.sampled_from(sorted(files))), draw(st.sampled_from(KINDS))
    size = len(files[name])
    last = max(0, size - 1)
    start = draw(st.integers(0, last) | st.integers(0, min(last, 100)) | st.integers(max(0, last - 100), last))
    some = draw(st.binary(min_size=1, max_size=64) | st.sampled_from([b"\0" * 64, b"\n", b"9"]))
    if kind == "delete":
        return Damage(kind, name, 0)
    if kind == "swap":  # as a copy gone wrong may do
        return Damage(kind, name, 0, copied=draw(st.sampled_from(sorted(files))))
    if kind == "truncate":
        return Damage(kind, name, start, removed=size - start)
    if kind == "cut out":
        return Damage(kind, name, start, removed=draw(st.integers(1, 64)))
    if kind == "overwrite":
        return Damage(kind, name, start, removed=len(some), inserted=some)
    if kind == "flip":
        flipped = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in files[name][start : start + 1])
        return Damage(kind, name, start, removed=1, inserted=flipped)
    return Damage(kind, name, size, inserted=some)


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("headroom")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


class Trained(NamedTuple):
    """A run as a kill after step 3 of 4 leaves it, with checkpoints 2 and 3, and what it gives whole."""

    place: Path  # its folder is `run` in here, its cache beside it
    files: Files
    newest: str  # its newest checkpoint
    loaded: Any
    older: Any  # the same without the newest checkpoint
    final: Files  # the tensors that it ends with


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Trained]:
    place = tmp_path_factory.mktemp("damaged")
    run = place / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call("train", OPTIONS, patch) == 0
        final = final_tensors(run)
        for path in run.glob("checkpoints/step_*"):
            if path.name not in ("step_00000002", "step_00000003"):
                shutil.rmtree(path)
        files, loaded = files_of(run), everything(run)
        shutil.rmtree(run / "checkpoints/step_00000003")
        before = everything(run)
        assert not same(loaded, before)
        yield Trained(place, files, "step_00000003", loaded, before, final)


def everything(run: Path) -> tuple[dict[str, torch.Tensor], Any, str]:
    model, tokenizer = load_run(run)
    return model.state_dict(), model.config, tokenizer.hash


def same(found, expected) -> bool:
    weights, wanted = found[0], expected[0]
    return (
        found[1:] == expected[1:]
        and weights.keys() == wanted.keys()
        and all(weights[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)
    )


def final_tensors(run: Path) -> Files:
    return {path.name: path.read_bytes() for path in run.glob("checkpoints/step_00000004/*.safetensors")}


def test_load_damaged_run_is_exact_or_raises_user_error(fuzz, trained):
    run = trained.place / "run"
    read = {name: content for name, content in trained.files.items() if is_read(name)}

    def check(damage: Damage) -> str:
        put(run, damaged(trained.files, damage))
        with warnings_heard() as heard:
            try:
                found = everything(run)
            except UserError as error:
                assert_one_line(error)
                return "refused"
        if same(found, trained.loaded):
            return "identical"
        assert trained.newest in damage.file
        assert same(found, trained.older)
        assert any(trained.newest in line for line in heard)
        return "an older checkpoint"

    fuzz(check, damages(read), short=60, long=1600)


def is_read(name: str) -> bool:
    """config.yaml stands for what the checkpoint says of itself: damage there must not change what is loaded."""
    return name in ("config.yaml", "tokenizer.json") or name.startswith("checkpoints/")


def test_resume_damaged_run_gives_same_bits_or_raises_user_error(fuzz, trained, monkeypatch, capsys):
    run = trained.place / "run"
    monkeypatch.chdir(trained.place)
    read = {name: content for name, content in trained.files.items() if is_read(name) and name != "config.yaml"}
    read["metrics.jsonl"] = trained.files["metrics.jsonl"]

    def check(damage: Damage) -> str:
        put(run, damaged(trained.files, damage))
        capsys.readouterr()
        code = call("train", ["resume=run"], monkeypatch)
        reported = capsys.readouterr().err
        if code == 2:
            assert reported.count("error: ") == 1
            return "refused"
        assert code == 0
        assert final_tensors(run) == trained.final
        passed_over = "checkpoints/" in damage.file and "after step 3" not in reported
        if passed_over:
            assert trained.newest in damage.file and trained.newest in reported
        return "an older checkpoint" if passed_over else "identical"

    fuzz(check, damages(read), short=8, long=200, shrink=False)


def test_metrics_file_damaged_keeps_rows_before(fuzz, tmp_path_factory, trained):
    """A changed digit cannot be detected, and a kill leaves a lost end; all rows before the damage must be right."""
    folder = tmp_path_factory.mktemp("metrics")
    path = folder / "metrics.jsonl"
    line = trained.files["metrics.jsonl"].splitlines(keepends=True)[0]
    content = b"".join(line.replace(b'"step": 1,', b'"step": %d,' % step) for step in range(1, 9))
    path.write_bytes(content)
    expected = read_metrics(path)
    assert [row["step"] for row in expected] == list(range(1, 9))

    def check(damage: Damage) -> str:
        put(folder, damaged({path.name: content}, damage))
        try:
            rows = read_metrics(path)
        except UserError as error:
            assert_one_line(error)
            return "refused"
        if rows == expected:
            return "identical"
        whole = content[: damage.start].count(b"\n")
        assert rows[:whole] == expected[:whole]
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        return "rows changed" if len(rows) == len(expected) else "rows lost"

    fuzz(check, damages({path.name: content}), short=40, long=300)


def test_prepare_damaged_cache_gives_same_tokens_or_raises_user_error(fuzz, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    corpus, config = configured(SyntheticCorpus, size=20), configured(BPEConfig, vocab_size=300)
    expected = tokens_of(corpus, config, cache)
    files = files_of(cache)
    read = {name: content for name, content in files.items() if "/." not in f"/{name}"}

    def check(damage: Damage) -> str:
        put(cache, damaged(files, damage))
        try:
            found = tokens_of(corpus, config, cache)
        except UserError as error:
            assert_one_line(error)
            return "refused"
        assert found == expected
        return "identical"

    fuzz(check, damages(read), short=60, long=800)


def tokens_of(corpus, config, cache: Path) -> tuple[bytes, bytes, str]:
    made = prepare(corpus, config, cache)
    train, val = (stream.read(0, len(stream)).astype(np.int64).tobytes() for stream in (made.train, made.val))
    return train, val, made.tokenizer.hash
