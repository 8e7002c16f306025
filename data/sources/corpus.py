"""Where documents come from. A corpus is a frozen description; asking it for documents reads them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self

from common.settings import FrozenSettings

Split = Literal["train", "val"]
HeldOutBy = Literal["content", "index"]


class Document(NamedTuple):
    name: str
    text: str
    held_out: bool  # of the validation split
    is_continuation: bool = False  # where the one before it in its split ended: a long document comes in parts

    @property
    def split(self) -> Split:
        return "val" if self.held_out else "train"


class SplitRule(NamedTuple):
    """Two corpora of equal rules that read one file hold out the same documents of it."""

    of_files: Any  # how files become documents, and which of those are held out
    of_texts: float | None  # the share of documents that a hash of their text holds out; None where no hash does


class Corpus(FrozenSettings, ABC):
    """Reads the same documents in the same order for as long as its fingerprint and its settings stay the same."""

    document_mask: bool = False  # tokens see their own document only; says nothing of the documents themselves

    @property
    @abstractmethod
    def name(self) -> str:
        """A short word for folders."""

    @property
    def remote(self) -> bool:
        """Reading is a download, so it is not done just to look."""
        return False

    def cache_key(self) -> dict[str, Any]:
        """The settings that the documents depend on, besides what the fingerprint tells."""
        return self.model_dump(exclude={"document_mask"})

    def with_fixed_revision(self) -> Self:
        """The same documents, whatever becomes of the name they were found under: what a run keeps."""
        return self

    def sources(self) -> list[str]:
        """The files of this machine that the documents are read from."""
        return []

    def split_rule(self) -> "SplitRule | None":
        """By which documents are held out; None where it is not a function of the document alone."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents change. Raises UserError where there is nothing to read."""

    @abstractmethod
    def read(self) -> Iterator[Document]:
        """The documents of both splits, in one pass and never all in memory. Raises UserError, naming the place, where
        one cannot be read as text."""

    def documents(self, split: Split) -> Iterator[Document]:
        return (document for document in self.read() if document.split == split)


def is_held_out(by: HeldOutBy, index: int, text: str, share: float) -> bool:
    """Whether a document of many is one of the share that is held out. By content, documents of the same text are on
    the same side, wherever they stand; by index, they need not be."""
    return hash_sample(index if by == "index" else hashlib.sha256(text.encode()).hexdigest(), share)


def hash_sample(index: int | str, share: float, purpose: str = "validation") -> bool:
    """Whether the document of this index is one of the share that is drawn: a hash decides, so it depends neither on
    how many follow nor on what they hold."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{index}".encode()).digest()[:8], "big") < share * 2**64
