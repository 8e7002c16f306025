"""Count the files, documents, duplicates and skipped rows of a corpus while it is read."""

import hashlib
import logging
from array import array
from collections.abc import Iterator

import numpy as np

from data.sources.corpus import Corpus, Document, Split
from data.sources.row_counts import RowCounts

MARKERS = ("<|endoftext|>", "<|end_of_text|>")  # separators that other programs write between documents
MAX_COMPARED = 2**23  # documents, 16 bytes of memory each
log = logging.getLogger("headroom")


class Contents:
    """Bytes of text and documents of each split, documents of both, and how many repeat the text of an earlier one.

    Text of one name is one document: the held-out part of a file belongs to the same document as the rest. Texts are
    compared by hashes of 8 bytes, for the first MAX_COMPARED; with n million different texts, the probability of a
    false duplicate is n²/37 million.
    """

    def __init__(self):
        self.bytes: dict[Split, int] = {}
        self.begun: dict[Split, int] = {}  # documents
        self.names = array("Q")  # hashes
        self.texts = array("Q")
        self.running = b""  # hash of the current document's text so far
        self.rows = RowCounts()
        self.markers: dict[str, tuple[int, str]] = {}  # count, and the name of the first document with one

    def add(self, document: Document) -> None:
        text = document.text.encode()
        self.bytes[document.split] = self.bytes.get(document.split, 0) + len(text)
        self.begun[document.split] = self.begun.get(document.split, 0) + (not document.is_continuation)
        for marker in MARKERS:
            if marker in document.text:
                count, first = self.markers.get(marker, (0, document.name))
                self.markers[marker] = (count + document.text.count(marker), first)
        if len(self.names) < MAX_COMPARED:
            previous = self.running if document.is_continuation else b""
            self.running = _hash(previous + text) if text else previous
            self.names.append(_number(_hash(document.name.encode(errors="surrogatepass"))))
            self.texts.append(_number(self.running) if text else 0)

    def documents_of(self, corpus: Corpus) -> Iterator[Document]:
        """The documents of a corpus; each is added as it is taken."""
        for document in corpus.read_counting(self.rows):
            self.add(document)
            yield document

    def summary(self, files: int) -> str:
        """A line with the counts. files: 0 where the documents do not come from files."""
        return "; ".join([self.documents_summary(files), *(f"{line}: skipped" for line in self.rows.lines())])

    def documents_summary(self, files: int) -> str:
        """As `summary`, without the rows of tables that are no documents."""
        documents, identical = self.documents()
        first = "" if self.compared_all else "the first "
        parts = [f"{files:,} file{'s' * (files != 1)}"] * bool(files)
        parts.append(f"{first}{documents:,} document{'s' * (documents != 1)}")
        parts += [f"{identical:,} of them identical to an earlier one"] * bool(identical)
        return ", ".join(parts)

    def warn_of_markers(self) -> None:
        for marker, (count, name) in self.markers.items():
            log.warning(
                f"{marker} stands {count:,} time{'s' * (count != 1)} in the text, first in {name}, and is trained on "
                f"as text: where it separates documents of a text file, give data.document='{marker}'"
            )

    @property
    def compared_all(self) -> bool:
        """Whether all documents were compared with those before them."""
        return len(self.names) < MAX_COMPARED

    def documents(self) -> tuple[int, int]:
        """Count documents and duplicates, of those that were compared; documents without text are not."""
        names, place = np.unique(np.frombuffer(self.names, np.uint64), return_inverse=True)
        texts = np.zeros(len(names), np.uint64)
        np.add.at(texts, place, np.frombuffer(self.texts, np.uint64))  # the parts of one document, in any order
        texts = texts[texts != 0]
        return len(names), len(texts) - len(np.unique(texts))


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
