"""Text to tokens and back: bytes, or byte-pair encoding. Every text comes back exactly."""

import base64
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data.config import DataConfig
from data.durable import read_regular, write_whole
from data.errors import UserError
from data.sealed import digest, sealed, unsealed

END_OF_TEXT = "<|endoftext|>"  # precedes each document; as plain text it is text like any other
# Words with the character before them, numbers of up to three digits, punctuation with the line's end, white space.
# Every character belongs to one of these, so nothing is lost.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECE = 25_000  # characters given to tiktoken at once (at most 100 kB): its regex engine overflows on very long runs
# Where every published pattern begins a new word, whatever stands around: a piece that begins here costs no token.
WORD = re.compile(r"(?<=\S)(?= [A-Za-z])")
LARGEST = 2**28  # bytes of a tokenizer.json; a vocabulary of a million tokens has a tenth of that
LOOK_BACK = 1000  # characters searched for one


class Tokenizer(ABC):
    """Tokens 0..V-2 stand for byte strings; the last one ends a text and stands for none."""

    tokens: Sequence[bytes]  # all but the last token

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> type:
        """The smallest type that holds a token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of text each token stands for."""
        return np.array([*map(len, self.tokens), 0])

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """(n,) of `dtype`. Special tokens never come out of plain text. Raises UserError for lone surrogates."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The end of a text decodes to nothing."""
        return b"".join(self.tokens[token] for token in tokens if token != self.end_of_text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What makes this tokenizer what it is, as plain JSON values."""

    @functools.cached_property
    def hash(self) -> str:
        return digest(self.describe())

    def save(self, path: Path) -> None:
        write_whole(path, sealed(self.describe()).encode())


class ByteTokenizer(Tokenizer):
    tokens = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer(Tokenizer):
    """tokens: the bytes and the merged tokens, in the order in which merges apply. words: cut long texts between words,
    so that they have the tokens that they would have uncut; else after line ends."""

    def __init__(self, tokens: Sequence[bytes], pattern: str, words: bool = False):
        import tiktoken

        self.tokens, self.pattern, self.words = tuple(tokens), pattern, words
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        self.encoding = tiktoken.Encoding(
            "headroom", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        pieces = [self.encoding.encode_ordinary(piece) for piece in _pieces(text, self.words)]
        return np.concatenate([np.array(piece, dtype=self.dtype) for piece in pieces] or [np.array([], self.dtype)])

    def describe(self) -> dict[str, Any]:
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return {"kind": "published" if self.words else "bpe", "pattern": self.pattern, "tokens": tokens}


class TokenizerConfig(DataConfig):
    @abstractmethod
    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The same texts in the same order give the same tokenizer. Reads of them what it needs."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """The size of the vocabulary, known before there is one; of one that text decides, the most it can have. Raises
        UserError where a file that says it cannot be read."""

    def share(self, total: int) -> float:
        """How much of so many bytes of training text `train` wants to read, spread over all of it."""
        return 1.0

    def refuse_missing(self) -> None:
        """Raises UserError where a file that `train` reads is not there, or is not the right one."""

    def identity(self) -> dict[str, Any]:
        """The settings that the tokens depend on."""
        return self.model_dump()

    def shortfall(self, tokenizer: Tokenizer) -> str | None:
        """What a tokenizer that this made lacks of what was asked for, in words for the user, if anything."""
        return None


class ByteConfig(TokenizerConfig):
    @property
    def name(self) -> str:
        return "byte"

    @property
    def most_tokens(self) -> int:
        return ByteTokenizer().vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return ByteTokenizer()


class BPEConfig(TokenizerConfig):
    vocab_size: int = Field(4096, ge=257, le=65536)  # a small corpus may yield fewer
    train_bytes: int = Field(100_000_000, ge=2**16)

    @property
    def name(self) -> str:
        return f"bpe{self.vocab_size}"

    @property
    def most_tokens(self) -> int:
        return self.vocab_size

    def shortfall(self, tokenizer: Tokenizer) -> str | None:
        if tokenizer.vocab_size == self.vocab_size:
            return None
        return (
            f"tokenizer.vocab_size={self.vocab_size}: the training text yields {tokenizer.vocab_size} tokens and no "
            "more, which the run goes on with; longer text gives more"
        )

    def share(self, total: int) -> float:
        return min(1.0, self.train_bytes / max(1, total))

    def train(self, texts: Iterable[str]) -> Tokenizer:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainee

        trainee = Trainee(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        sample = _first(texts, self.train_bytes)
        trainee.train_from_iterator((piece for text in sample for piece in _pieces(text)), trainer)
        merges = json.loads(trainee.to_str())["model"]["merges"]
        byte_of = {visible: byte for byte, visible in _visible_bytes()}
        merged = (bytes(byte_of[character] for character in left + right) for left, right in merges)
        return BPETokenizer(list(dict.fromkeys([*ByteTokenizer.tokens, *merged])), PATTERN)


class StoredConfig(TokenizerConfig):
    """The tokenizer of a run, for another that goes on from its weights."""

    path: str  # of its tokenizer.json
    hash: str  # of what it holds

    def identity(self) -> dict[str, Any]:
        return {"hash": self.hash}

    def refuse_missing(self) -> None:
        self.train(())

    @property
    def name(self) -> str:
        return f"stored{self.hash[:8]}"

    @property
    def most_tokens(self) -> int:
        return self.train(()).vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        stored = load_tokenizer(Path(self.path))
        if stored.hash != self.hash:
            raise UserError(f"{self.path} is not the tokenizer it was: bring it back, or start a new run")
        return stored


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError where the file is missing, damaged, or not a tokenizer."""
    try:
        content = unsealed(read_regular(path, LARGEST).decode())
        if content["kind"] == "byte":
            return ByteTokenizer()
        tokens = [base64.b64decode(token) for token in content["tokens"]]
        return BPETokenizer(tokens, content["pattern"], words=content["kind"] == "published")
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer {path} is damaged: {error}") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None


def _first(texts: Iterable[str], most: int) -> Iterator[str]:
    """The texts, up to and with the one that makes `most` bytes."""
    for text in texts:
        yield text
        most -= len(_utf8(text))
        if most <= 0:
            return


def _pieces(text: str, words: bool = False) -> Iterator[str]:
    """Cuts a long text between words, or after line ends, where it can; the cuts depend on the text alone."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            found = [match.start() for match in WORD.finditer(text, end - LOOK_BACK, end)] if words else []
            end = found[-1] if found else text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _visible_bytes() -> Iterator[tuple[int, str]]:
    """The characters by which byte-level BPE (Radford et al. 2019) spells bytes: printable Latin-1 stands for itself,
    the others for 256, 257, ... in their order."""
    spare = 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            yield byte, chr(byte)
        else:
            yield byte, chr(spare)
            spare += 1
