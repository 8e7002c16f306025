"""Published vocabularies, read from a file of this machine: never fetched behind anyone's back."""

import base64
import binascii
import hashlib
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from common.atomic_io import read_regular
from common.errors import UserError, reason
from data.tokenizers.patterns import CL100K, GPT2, O200K
from data.tokenizers.tokenizer import BPETokenizer, Tokenizer, TokenizerConfig
from data.tokenizers.vocabulary import fault_of

LARGEST = 2**26  # bytes of a vocabulary
SOURCE = "https://openaipublic.blob.core.windows.net/encodings"


class Published(NamedTuple):
    """A vocabulary: in the folder it is called `<name>.tiktoken`."""

    name: str
    url: str
    sha256: str | None  # None does not check
    tokens: int  # with the one that ends a text
    pattern: str


class PublishedConfig(TokenizerConfig):
    """The end of a text is our own last token, as everywhere here: GPT-2's has the same number, those of the others are
    one below theirs."""

    folder: str = Field("cache/tokenizers", min_length=1)
    cut: Literal["exact", "words"] = "exact"  # where long texts are cut, see BPETokenizer

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

    def refuse_missing(self) -> None:
        self._content()

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return BPETokenizer(_tokens(self._path, self._content()), self.published.pattern, self.cut)

    @property
    def _path(self) -> Path:
        return Path(self.folder) / f"{self.name}.tiktoken"

    def _content(self) -> bytes:
        try:
            content = read_regular(self._path, LARGEST)
        except FileNotFoundError:
            raise UserError(
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
    """Each line is a token in base64, a space, and its rank."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            found[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}, is not a token and its rank: fetch the file again") from None
    tokens = [found[rank] for rank in sorted(found)]
    fault = fault_of(tokens) if sorted(found) == list(range(len(tokens))) else "it lacks a rank or has one below 0"
    if fault:
        raise UserError(f"{path} is not a whole vocabulary: {fault}")
    return tokens
