"""Files of tokens: nanoGPT's and llm.c's are read as they are, split by their names; others are refused by name."""

import numpy as np
import pytest
from pydantic import ValidationError

from common.errors import UserError
from data.shards import copy_tokens
from data.shards.prepare import Prepared, prepare
from data.sources import tokens
from data.sources.tokens import TokensCorpus
from data.tokenizers.byte import ByteConfig
from tests.support import composed_run, configured

END = 256  # of a text, in bytes
FILE = np.concatenate([[END, *f"text {i}".encode()] for i in range(500)]).astype("<u2")


def header(count: int, magic: int = 20240520, version: int = 1) -> bytes:
    return np.array([magic, version, count, *[0] * 253], "<i4").tobytes()


def llmc(file: np.ndarray) -> bytes:
    return header(len(file)) + file.tobytes()


def made(folder, path: str = "*.bin", **settings) -> Prepared:
    return prepare(configured(TokensCorpus, path=f"{folder}/{path}", **settings), configured(ByteConfig), folder / "c")


def read(stream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def refusal(folder, path: str = "*.bin") -> str:
    with pytest.raises(UserError) as caught:
        made(folder, path)
    return str(caught.value)


@pytest.mark.parametrize("block", [7, 2**22])
@pytest.mark.parametrize("content", [np.ndarray.tobytes, llmc], ids=["nanoGPT", "llm.c"])
def test_tokens_named_files_are_the_splits(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", block)
    for name, file in {"x_train_1": FILE[:1000], "x_train_2": FILE[1000:], "x_val_0": FILE[:700]}.items():
        (tmp_path / f"{name}.bin").write_bytes(content(file))
    found = made(tmp_path)
    assert read(found.train) == FILE.tolist() and read(found.val) == FILE[:700].tolist()
    assert found.contents == f"3 files, {(FILE == END).sum() + (FILE[:700] == END).sum()} ends of text"
    assert found.training_documents([(990, 1010)]) == [f"{tmp_path}/x_train_{n}.bin" for n in (1, 2)]
    assert read(made(tmp_path, path="").train) == FILE.tolist()  # the folder


def test_tokens_without_validation_file_hold_out_the_end_of_each(tmp_path):
    (tmp_path / "a.bin").write_bytes(FILE.tobytes())
    (tmp_path / "b.bin").write_bytes(np.full(1000, 7, "<u2").tobytes())  # one document
    found = made(tmp_path, val_fraction=0.2)
    train, val = read(found.train), read(found.val)
    cut = len(FILE) - (len(val) - 200)
    assert train == [*FILE[:cut], *[7] * 800] and val == [*FILE[cut:], *[7] * 200]
    assert FILE[cut] == END and END not in FILE[int(len(FILE) * 0.8) : cut]


def test_tokens_fingerprint_knows_what_is_held_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(FILE.tobytes())
    corpus = configured(TokensCorpus, path=f"{tmp_path}/*.bin")
    before = corpus.fingerprint()
    (tmp_path / "a.bin").rename(tmp_path / "a_val.bin")
    assert corpus.fingerprint() != before


BAD_FILES = {
    "odd": (b"abc", "a.bin has an odd number of bytes, 3"),
    "empty": (b"", "a.bin holds no tokens"),
    "header alone": (header(0), "a.bin holds no tokens"),
    "cut short": (llmc(FILE)[:-2], f"a.bin holds {len(FILE) - 1:,} tokens, its header says {len(FILE):,}: fetch"),
    "magic": (header(9, magic=20240801) + bytes(18), "a.bin begins with a header of magic 20240801 and version 1"),
    "choices": (
        np.array([20240522, 1, 2, 900, *[0] * 252], "<i4").tobytes() + bytes(18),
        "a.bin begins with a header of magic 20240522",
    ),
    "version": (header(9, version=7) + bytes(18), "a.bin begins with a header of magic 20240520 and version 7"),
    "vocabulary": (FILE[:9].tobytes() + b"\1\1", "a.bin holds token 257 (its number 10), tokenizer=byte has 257 from"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_tokens_of_another_kind_raise_error_with_name(tmp_path, case):
    content, complaint = BAD_FILES[case]
    (tmp_path / "a.bin").write_bytes(content)
    assert complaint in refusal(tmp_path)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").glob("[!.]*"))


def test_tokens_on_a_full_disk_keep_nothing_and_do_not_say_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.bin").write_bytes(FILE.tobytes())
    monkeypatch.setattr(copy_tokens.ShardWriter, "write", full)
    assert refusal(tmp_path).endswith("No space left on device: make room and run again")
    assert not list((tmp_path / "c").glob("[!.]*"))


def test_tokens_without_training_file_raise_error(tmp_path):
    assert "matches no file" in refusal(tmp_path)
    (tmp_path / "val.bin").write_bytes(FILE.tobytes())
    assert "has nothing to train on: " in refusal(tmp_path)


def test_tokens_need_a_tokenizer_that_is_not_trained():
    with pytest.raises(UserError, match="data=tokens has no text to train a tokenizer on: name the one that"):
        composed_run("data=tokens", "data.path=a.bin")
    assert composed_run("data=tokens", "data.path=a.bin", "tokenizer=gpt2").data.path == "a.bin"
    with pytest.raises((UserError, ValidationError), match="has no documents of text to be mixed"):
        composed_run("data=mix", "data.parts={tokens: {quota: 1, path: a.bin}}", "tokenizer=gpt2")
