"""The interface of a corpus: a frozen description, which reads documents when it is asked for them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from common.settings import FrozenSettings
from data.sources.row_counts import RowCounts

Split = Literal["train", "val"]
HeldOutBy = Literal["content", "index"]


class Document(NamedTuple):
    name: str
    text: str
    held_out: bool  # in the validation split
    is_continuation: bool = False  # continues the previous document of its split: a long one comes in parts
    prompt: int = 0  # characters at the beginning of the text that are read, but not counted

    @property
    def split(self) -> Split:
        return "val" if self.held_out else "train"


class SplitRule(NamedTuple):
    """The rule by which documents are split. Two corpora with equal rules that read one file hold out the same
    documents of it."""

    of_files: Any  # settings by which files become documents and documents are held out
    of_texts: float | None  # fraction of documents held out by a hash of their text; None: not by a hash


class Corpus(FrozenSettings, ABC):
    """Reads the same documents in the same order as long as its fingerprint and its settings stay the same."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The corpus's name in the names of cache folders."""

    @property
    def numbers(self) -> int | None:
        """Where documents are written in numbers from 0, how many there are; None: they are text."""
        return None

    @property
    def has_text(self) -> bool:
        """Whether its documents are text; else they are tokens already."""
        return True

    @property
    def has_prompts(self) -> bool:
        """Whether documents may begin with a prompt, of which no token is counted."""
        return False

    @property
    def remote(self) -> bool:
        """Whether reading downloads, so that it is not done only to check."""
        return False

    def derive(self, context_length: int) -> Self:
        """The corpus with what it leaves unset derived from the length of a window. Raises ValueError where it does not
        fit that."""
        return self

    def counted(self, context_length: int) -> np.ndarray | None:
        """Which targets of every window count, (T,) bool; None: all, and nothing but the loss is measured of them."""
        return None

    def cache_key(self) -> dict[str, Any]:
        """The settings that the documents depend on, except those that the fingerprint covers."""
        return self.model_dump()

    def with_fixed_revision(self) -> Self:
        """The same corpus with its branch or tag replaced by a commit, so that a resumed run reads the same data."""
        return self

    def sources(self) -> list[str]:
        """The local files that the documents are read from."""
        return []

    def split_rule(self) -> SplitRule | None:
        """The rule by which documents are held out; None where it depends on more than the document."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the documents change. Raises UserError where there is nothing to read."""

    @abstractmethod
    def read(self) -> Iterator[Document]:
        """The documents of both splits, in one pass and never all in memory. Raises UserError, with the file and the
        line, where one cannot be read as text."""

    def read_counting(self, counts: RowCounts) -> Iterator[Document]:
        """As `read`. counts: of the rows of tables, which grow while they are read."""
        return self.read()

    def documents(self, split: Split) -> Iterator[Document]:
        return (document for document in self.read() if document.split == split)


def is_held_out(by: HeldOutBy, index: int, text: str, share: float) -> bool:
    """Whether a hash puts a document into the held-out fraction. By content, documents with the same text are in the
    same split, wherever they stand; by index, they need not be."""
    return hash_sample(index if by == "index" else hashlib.sha256(text.encode()).hexdigest(), share)


def hash_sample(index: int | str, share: float, purpose: str = "validation") -> bool:
    """Whether a hash puts this index into a sample of fraction `share`: it does not depend on any other index."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{index}".encode()).digest()[:8], "big") < share * 2**64
