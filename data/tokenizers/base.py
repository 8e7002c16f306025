"""The interface of a tokenizer and of its settings: text to tokens and back, every text exactly."""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from common.atomic_io import write_atomic
from common.checksummed_json import digest
from common.errors import UserError
from common.settings import FrozenSettings

Cut = Literal["exact", "words", "line_ends"]


class Tokenizer(ABC):
    """Tokens 0..V-2 stand for byte strings; the last one, the end of text, stands for none."""

    tokens: Sequence[bytes]  # all but the last token
    cut: Cut | None = None  # where a long text is cut before it is encoded; None where that changes no token anyway

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> type:
        """The smallest type that fits every token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of text each token stands for."""
        return np.array([*map(len, self.tokens), 0])

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Encode a text -> (n,) of `dtype`, without special tokens. Raises UserError for lone surrogates."""

    def encode_continuation(self, text: str) -> np.ndarray:
        """As `encode`, of what goes on from another text: without what a tokenizer puts before a whole one."""
        return self.encode(text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Decode tokens to bytes; the end of text decodes to nothing."""
        return b"".join(self.tokens[token] for token in tokens if token != self.end_of_text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode tokens to text; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The rules and tokens that decide how text is encoded, as JSON values. `hash` is their hash."""

    def plain(self) -> "Tokenizer":
        """With the same tokens, and without a rule of its `content` that other programs follow to put more around a
        text."""
        return self

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """The content of tokenizer.json, which `load_tokenizer` and Hugging Face's libraries read."""

    @functools.cached_property
    def hash(self) -> str:
        return digest(self.describe())

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(self.content(), indent=0).encode())


class TokenizerConfig(FrozenSettings, ABC):
    @property
    @abstractmethod
    def name(self) -> str:
        """The tokenizer's name in the names of cache folders."""

    @abstractmethod
    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Train the tokenizer; the same texts in the same order give the same one. Reads only as many of them as it
        needs."""

    @property
    @abstractmethod
    def max_vocab_size(self) -> int:
        """The size of the vocabulary before it is made; an upper bound where training decides. Raises UserError where
        it is read from a file that cannot be read."""

    @property
    def is_trained(self) -> bool:
        """Whether `train` needs texts."""
        return False

    def sample_fraction(self, total: int) -> float:
        """The fraction of `total` bytes of training text that `train` wants to read, spread over all of it."""
        return 1.0

    def check_available(self) -> None:
        """Raises UserError where a file that `train` reads is missing, or is not the right one."""

    def derive(self, data: str, numbers: int | None) -> Self:
        """The settings with what they leave unset derived from the data. data: its name; numbers: as `Corpus.numbers`.
        Raises ValueError where the two do not go together."""
        if numbers is not None:
            raise ValueError(f"data={data} is written in numbers, a token each: choose tokenizer=numbers")
        return self

    def cache_key(self) -> dict[str, Any]:
        """The settings that the tokens depend on, as part of the name of prepared shards. A setting that older runs
        did not have adds no key at its old behaviour, so that their shards are found."""
        return self.model_dump()

    def vocab_warning(self, tokenizer: Tokenizer) -> str | None:
        """A warning for the user where the trained tokenizer falls short of these settings."""
        return None


def encode_utf8(text: str) -> bytes:
    """Encode as UTF-8. Raises UserError for lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None
