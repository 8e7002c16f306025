"""Text that is tokens already: .bin files of nanoGPT, which are bare uint16 tokens, and of llm.c, which have a header
before them. They are not encoded again; the user says which tokenizer made them."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from common.errors import UserError
from common.paths import is_folder, matching_files, raise_unreadable, working_folder
from data.sources.corpus import Corpus, Document, Split

DTYPE = np.dtype("<u2")
HEADER = np.dtype("<i4")
HEADER_BYTES = 256 * HEADER.itemsize  # of llm.c: its magic, its version, the number of tokens, then zeros
LLMC_MAGIC = 20240520
LLMC_VERSION = 1
OTHER_MAGIC = (20240522, 20240801)  # of llm.c's multiple choices, and of its files for Llama 3, in four bytes a token
STATED = 3  # numbers that llm.c's header states
BLOCK_TOKENS = 2**22  # in memory at one time


class TokenFile(NamedTuple):
    path: str
    start: int  # bytes before its tokens
    tokens: int
    is_val: bool  # named so


class TokenBlock(NamedTuple):
    path: str
    place: int  # of the first token in the file, from 0
    tokens: np.ndarray  # (n,) uint16


class TokensCorpus(Corpus):
    """The files' tokens one after another, in the order of their names.

    Fingerprint: SHA-256 over the files, and which of them are held out.
    """

    path: str = Field(min_length=1)
    val_fraction: float = Field(gt=0, lt=1)

    @property
    def name(self) -> str:
        return "tokens"

    @property
    def has_text(self) -> bool:
        return False

    def sources(self) -> list[str]:
        if is_folder(os.path.expanduser(self.path)):
            return matching_files(f"{self.path}/*.bin")
        return matching_files(self.path)

    def files(self) -> list[TokenFile]:
        """Raises UserError for a file that is none of tokens, and where there is none to train on."""
        found = [_token_file(path) for path in self.sources()]
        if not found:
            raise UserError(
                f"data.path={self.path!r} matches no file (looked from {working_folder()}): give a .bin file, a folder "
                "of them, or a quoted pattern, as in data.path='fineweb/*.bin'"
            )
        if all(file.is_val for file in found):
            raise UserError(
                f"data.path={self.path!r} has nothing to train on: {found[0].path} is of the validation split by its "
                "name; give the files of the training split too"
            )
        return found

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"1")
        for file in self.files():
            try:
                with open(file.path, "rb") as content:
                    digest.update(bytes([file.is_val]) + hashlib.file_digest(content, "sha256").digest())
            except OSError as error:
                raise_unreadable(file.path, error)
        return digest.hexdigest()

    def read(self) -> Iterator[Document]:
        """No documents: `tokens` has what would be encoded."""
        return iter(())

    def tokens(self, split: Split, document_start: int) -> Iterator[TokenBlock]:
        """The tokens of a split, a block at a time. document_start: the token that begins a document."""
        files = self.files()
        named = any(file.is_val for file in files)
        for file in files:
            cut = (0 if file.is_val else file.tokens) if named else self._cut(file, document_start)
            yield from _blocks(file, cut, file.tokens) if split == "val" else _blocks(file, 0, cut)

    def _cut(self, file: TokenFile, document_start: int) -> int:
        """Where what is held out of a file begins: at a document, or in the midst of one that reaches to the end."""
        goal = int(file.tokens * (1 - self.val_fraction))
        for block in _blocks(file, goal, file.tokens):
            begins = np.flatnonzero(block.tokens == document_start)
            if len(begins):
                return block.place + int(begins[0])
        return goal


def _token_file(path: str) -> TokenFile:
    """Raises UserError where the file is not made of tokens, or ends before its last one."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise_unreadable(path, error)
    is_val = not {"val", "valid", "validation"}.isdisjoint(re.split(r"[^a-z]+", Path(path).stem.lower()))
    start = HEADER_BYTES if _has_header(path, head) else 0
    if not path.endswith(".bin"):
        raise UserError(
            f"{path} is not called .bin, as files of tokens are: is it text, for data=files? Else rename it"
        )
    if not start and len(head) == HEADER_BYTES and not np.frombuffer(head, DTYPE)[1::2].any():
        raise UserError(f"{path} has zeros at all odd places, as tokens of four bytes have: write it as np.uint16")
    if size == start:
        raise UserError(f"{path} holds no tokens: remove it, or exclude it from data.path")
    if (size - start) % DTYPE.itemsize:
        raise UserError(
            f"{path} has an odd number of bytes, {size:,}, which are no tokens of two bytes: it is cut short, or of "
            "another kind; replace or exclude it"
        )
    tokens = (size - start) // DTYPE.itemsize
    stated = int(np.frombuffer(head, HEADER)[STATED - 1]) if start else tokens
    if stated != tokens:
        raise UserError(f"{path} holds {tokens:,} tokens, its header says {stated:,}: fetch or write it again")
    return TokenFile(path, start, tokens, is_val)


def _has_header(path: str, head: bytes) -> bool:
    """Whether a file begins as llm.c's do, or nearly: with three numbers and 253 zeros, as no text does."""
    if len(head) < HEADER_BYTES:
        return False
    magic, version, _, *rest = np.frombuffer(head, HEADER).tolist()
    if any(rest) and magic not in (LLMC_MAGIC, *OTHER_MAGIC):
        return False
    if (magic, version) != (LLMC_MAGIC, LLMC_VERSION):
        raise UserError(
            f"{path} begins with a header of magic {magic} and version {version}: what is read is llm.c's for GPT-2, "
            f"of magic {LLMC_MAGIC} and version {LLMC_VERSION}, or tokens without a header; write it so, or exclude it"
        )
    return True


def _blocks(file: TokenFile, first: int, stop: int) -> Iterator[TokenBlock]:
    """Tokens first ... stop - 1 of a file."""
    try:
        with open(file.path, "rb") as content:
            content.seek(file.start + first * DTYPE.itemsize)
            for place in range(first, stop, BLOCK_TOKENS):
                count = min(BLOCK_TOKENS, stop - place)
                read = content.read(count * DTYPE.itemsize)
                if len(read) != count * DTYPE.itemsize:
                    raise UserError(f"{file.path} changed while it was read: run again")
                yield TokenBlock(file.path, place, np.frombuffer(read, DTYPE))
    except OSError as error:
        raise_unreadable(file.path, error)
