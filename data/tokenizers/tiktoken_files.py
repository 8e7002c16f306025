"""Published vocabularies in tiktoken's file format, read from a local file. Nothing is downloaded without the user."""

import base64
import binascii
import hashlib
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from common.atomic_io import read_regular
from common.errors import NotFetched, UserError, reason
from data.tokenizers.base import Tokenizer, TokenizerConfig
from data.tokenizers.bpe import BPETokenizer
from data.tokenizers.patterns import CL100K, GPT2, O200K
from data.tokenizers.vocabulary import vocabulary_fault

MAX_BYTES = 2**26  # of a vocabulary file
SOURCE = "https://openaipublic.blob.core.windows.net/encodings"


class Published(NamedTuple):
    """A published vocabulary; its file is `<name>.tiktoken`."""

    name: str
    url: str
    sha256: str | None  # of the file; None skips the check
    tokens: int  # with the end of text
    pattern: str


class PublishedConfig(TokenizerConfig):
    """The end-of-text token is the last one, as in every tokenizer here: that is GPT-2's own id, and for the others
    one below theirs."""

    folder: str = Field(min_length=1)
    cut: Literal["exact", "words"]  # where long texts are cut, see BPETokenizer

    @property
    @abstractmethod
    def published(self) -> Published: ...

    @property
    def name(self) -> str:
        return self.published.name

    @property
    def max_vocab_size(self) -> int:
        return self.published.tokens

    def cache_key(self) -> dict[str, Any]:
        return {"sha256": self.published.sha256} | ({} if self.cut == "words" else {"cut": self.cut})

    def check_available(self) -> None:
        self._content()

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return BPETokenizer(_tokens(self._path, self._content()), self.published.pattern, self.cut)

    @property
    def _path(self) -> Path:
        return Path(self.folder) / f"{self.name}.tiktoken"

    def _content(self) -> bytes:
        try:
            content = read_regular(self._path, MAX_BYTES)
        except FileNotFoundError:
            raise NotFetched(
                f"tokenizer={self.name}: there is no {self._path}: fetch {self.published.url} and put it into "
                f"{self.folder} as {self._path.name}, or say with tokenizer.folder= where it is"
            ) from None
        except OSError as error:
            raise UserError(f"the vocabulary {self._path} cannot be read: {reason(error)}") from None
        found = hashlib.sha256(content).hexdigest()
        if self.published.sha256 not in (None, found):
            raise UserError(
                f"{self._path} is not the vocabulary of tokenizer={self.name}: its SHA-256 begins with {found[:12]}, "
                f"the published one with {self.published.sha256[:12]}: fetch {self.published.url} again"
            )
        return content


class GPT2Config(PublishedConfig):
    @property
    def published(self) -> Published:
        return Published(
            "gpt2",
            f"{SOURCE}/r50k_base.tiktoken",  # the same tokens and ranks, in this format
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            50_257,
            GPT2,
        )


class CL100KConfig(PublishedConfig):
    @property
    def published(self) -> Published:
        return Published(
            "cl100k",
            f"{SOURCE}/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            100_257,
            CL100K,
        )


class O200KConfig(PublishedConfig):
    @property
    def published(self) -> Published:
        return Published(
            "o200k",
            f"{SOURCE}/o200k_base.tiktoken",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
            199_999,
            O200K,
        )


def _tokens(path: Path, content: bytes) -> list[bytes]:
    """Parse the file: each line is a token in base64, a space, and its rank."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            found[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}, is not a token and its rank: fetch the file again") from None
    tokens = [found[rank] for rank in sorted(found)]
    complete = sorted(found) == list(range(len(tokens)))
    fault = vocabulary_fault(tokens) if complete else "it lacks a rank or has one below 0"
    if fault:
        raise UserError(f"{path} is not a whole vocabulary: {fault}")
    return tokens
