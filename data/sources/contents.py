"""What there is in a corpus, counted while it is read."""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from data.sources.corpus import Document, Split

MARKERS = ("<|endoftext|>", "<|end_of_text|>")  # what others write between documents
COMPARED = 2**23  # documents, 16 bytes of memory each
log = logging.getLogger("headroom")


class Contents:
    """Bytes of text of each split, documents, and how many of them have the text of an earlier one.

    A document is what has one name: the part of a file that is held out belongs to the document that the rest is.
    Texts are compared by hashes of 8 bytes, up to COMPARED of them; n million differing ones would be counted as one
    too many with a probability of n²/37 million.
    """

    def __init__(self):
        self.bytes: dict[Split, int] = {}
        self.names, self.texts, self.running = array("Q"), array("Q"), b""
        self.markers: dict[str, tuple[int, str]] = {}  # how many, and the name of the first document with one

    def add(self, document: Document) -> None:
        text = document.text.encode()
        self.bytes[document.split] = self.bytes.get(document.split, 0) + len(text)
        for marker in MARKERS:
            if marker in document.text:
                count, first = self.markers.get(marker, (0, document.name))
                self.markers[marker] = (count + document.text.count(marker), first)
        if len(self.names) < COMPARED:
            before = self.running if document.is_continuation else b""
            self.running = _hash(before + text) if text else before
            self.names.append(_number(_hash(document.name.encode(errors="surrogatepass"))))
            self.texts.append(_number(self.running) if text else 0)

    def counting(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, each added as it is taken."""
        for document in documents:
            self.add(document)
            yield document

    def summary(self, files: int) -> str:
        """For a line. files: 0 where the documents come from none."""
        documents, identical = self._documents()
        first = "the first " if len(self.names) == COMPARED else ""
        parts = [f"{files:,} file{'s' * (files != 1)}"] * bool(files)
        parts.append(f"{first}{documents:,} document{'s' * (documents != 1)}")
        return ", ".join(parts) + f", {identical:,} of them identical to an earlier one" * bool(identical)

    def warn_of_markers(self) -> None:
        for marker, (count, name) in self.markers.items():
            log.warning(
                f"{marker} stands {count:,} time{'s' * (count != 1)} in the text, first in {name}, and is trained on "
                f"as text: where it separates documents of a text file, give data.document='{marker}'"
            )

    def _documents(self) -> tuple[int, int]:
        """How many there are, and how many have the text of an earlier one; those without text are like no other."""
        names, place = np.unique(np.frombuffer(self.names, np.uint64), return_inverse=True)
        texts = np.zeros(len(names), np.uint64)
        np.add.at(texts, place, np.frombuffer(self.texts, np.uint64))  # the parts of one document, in any order
        texts = texts[texts != 0]
        return len(names), len(texts) - len(np.unique(texts))


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
