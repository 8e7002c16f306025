"""Published vocabularies: read from a file or rejected, with the tokens of tiktoken itself."""

import base64
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public as theirs

from common.errors import UserError
from data.shards.prepare import prepare
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.load import load_tokenizer
from data.tokenizers.patterns import PIECE
from data.tokenizers.tiktoken_files import CL100KConfig, GPT2Config, O200KConfig, Published
from data.tokenizers.vocabulary import END_OF_TEXT
from tests.data.opening import assert_opened
from tests.support import configured

TEXTS = [document.text for document in configured(SyntheticCorpus, size=20).documents("train")]
VOCABULARY = configured(BPEConfig, vocab_size=400).train(TEXTS).tokens
FILE = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(VOCABULARY))
CONFIGS = [GPT2Config, CL100KConfig, O200KConfig]


class Small(GPT2Config):
    """A small vocabulary for tests, with GPT-2's pattern."""

    @property
    def published(self) -> Published:
        return super().published._replace(name="small", sha256=hashlib.sha256(FILE).hexdigest())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocabularies").mkdir()
    (tmp_path / "vocabularies" / "small.tiktoken").write_bytes(FILE)
    return str(tmp_path / "vocabularies")


def test_published_vocabularies_match_tiktoken_definitions(monkeypatch):
    loaded = []
    monkeypatch.setattr(theirs, "load_tiktoken_bpe", lambda url, expected_hash: loaded.append((url, expected_hash)))
    for config, name in zip(CONFIGS, ("r50k_base", "cl100k_base", "o200k_base"), strict=True):
        published = configured(config).published
        found = theirs.ENCODING_CONSTRUCTORS[name]()
        assert found["pat_str"] == published.pattern
        assert loaded[-1] == (published.url, published.sha256)
        gap = 0 if name == "r50k_base" else 1  # the number that their end of text leaves free
        assert configured(config).max_vocab_size == found["special_tokens"][END_OF_TEXT] + 1 - gap


@pytest.mark.parametrize("config", CONFIGS)
def test_published_tokens_match_tiktoken_and_hugging_face(config, folder, tmp_path):
    class Ours(config):
        @property
        def published(self) -> Published:
            return super().published._replace(name="small", sha256=None)

    tokenizer = configured(Ours, folder=folder).train([])
    ranks = {token: rank for rank, token in enumerate(VOCABULARY)}
    whole = tiktoken.Encoding("whole", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
    texts = ["\n".join(TEXTS * 20), "x = (1,\n\n   ' They''re 12 345 ünï' )  \r\n" * 1000 + "\n  "]
    for text in texts:
        assert len(text) > PIECE
        assert tokenizer.encode(text).tolist() == whole.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "tokenizer.json")
    assert_opened(tmp_path / "tokenizer.json", tokenizer, texts)


def test_cache_key_published_settings_of_older_runs_is_unchanged():
    for config in CONFIGS:
        identity = {"sha256": configured(config).published.sha256}  # as recorded before there was a cut
        assert configured(config, cut="words").cache_key() == identity
        assert configured(config).cache_key() == identity | {"cut": "exact"}


def test_published_end_of_text_is_last_and_never_encoded(folder):
    tokenizer = configured(Small, folder=folder).train([])
    assert tokenizer.vocab_size == len(VOCABULARY) + 1 and tokenizer.end_of_text == len(VOCABULARY)
    assert tokenizer.end_of_text not in tokenizer.encode(f"a {END_OF_TEXT} b")
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


def test_published_saved_tokenizer_needs_no_vocabulary_file(folder, tmp_path):
    tokenizer = configured(Small, folder=folder).train([])
    tokenizer.save(tmp_path / "tokenizer.json")
    os.remove(f"{folder}/small.tiktoken")
    again, text = load_tokenizer(tmp_path / "tokenizer.json"), "the query sees " * 4000
    assert again.hash == tokenizer.hash
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_prepare_again_needs_no_vocabulary_file(folder, tmp_path):
    corpus = configured(SyntheticCorpus, size=20)
    first = prepare(corpus, configured(Small, folder=folder), tmp_path / "cache")
    again = prepare(corpus, configured(Small, folder="elsewhere"), tmp_path / "cache")
    assert again.folder == first.folder and again.folder.name.startswith("synthetic-small-")


def test_prepare_missing_vocabulary_raises_error_with_url_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(SyntheticCorpus, "fingerprint", None)
    with pytest.raises(UserError) as caught:
        prepare(configured(SyntheticCorpus), configured(GPT2Config, folder="none"), tmp_path / "cache")
    for part in ("none/gpt2.tiktoken", "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (FILE[:-20], "is not the vocabulary of tokenizer=small"),
        (b"", "is not the vocabulary"),
        (None, "cannot be read: it is no regular file"),
        (FILE + b"nonsense\n", "line [0-9]+, is not a token and its rank"),
        (FILE.replace(b" 7\n", b" 8\n"), "is not a whole vocabulary"),
        (FILE.split(b"\n", 1)[1], "is not a whole vocabulary"),
        (FILE + b"QQ== %d\n" % len(VOCABULARY), "is not a whole vocabulary: it names a token twice"),
        (FILE + b"QQQ= -1\n", "is not a whole vocabulary"),
    ],
    ids=["cut", "empty", "pipe", "nonsense", "rank twice", "rank lacking", "token twice", "negative"],
)
def test_published_wrong_file_raises_error_with_name(folder, content, complaint):
    path = Path(folder) / "small.tiktoken"
    if content is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(content)

    class Unchecked(Small):
        @property
        def published(self) -> Published:
            return super().published._replace(sha256=None)

    config = configured(Small if "is not the vocabulary" in complaint else Unchecked, folder=folder)
    with pytest.raises(UserError, match=complaint) as caught:
        config.train([])
    assert "small.tiktoken" in str(caught.value)


def test_published_large_vocabulary_uses_uint32():
    tokens = [bytes([i]) for i in range(256)] + [b"a" * n for n in range(2, 70)]
    tokens += [bytes([97 + i // 676 % 26, 97 + i // 26 % 26, 97 + i % 26, 65 + i // 17576]) for i in range(66_000)]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))

    class Large(Small):
        def _content(self) -> bytes:
            return lines

    tokenizer = configured(Large).train([])
    assert tokenizer.dtype == np.uint32 and tokenizer.encode("aaaa").dtype == np.uint32
