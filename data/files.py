"""Files of the user's own: text, and tables with a column of text."""

import codecs
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field

from data.corpus import Corpus, Document, drawn
from data.errors import UserError
from data.tables import FORMATS, cells, format_of, refuse_no_column

PART = 2**24  # bytes of a long file in memory at one time
DEFAULT_COLUMN = "text"
NOT_TEXT = {  # how files begin that look like text, or whose kind says more than the byte that cannot be text
    b"%PDF-": "a PDF",
    b"{\\rtf": "RTF",
    b"PK\x03\x04": "a zip archive (as .docx and .epub are)",
    b"\x1f\x8b": "compressed by gzip",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
WAY_OUT = f"convert or exclude it; what is read is UTF-8 text, and tables named {' '.join(FORMATS)}"


class FilesCorpus(Corpus):
    """Where a file is one document, the last part of each is held out, cut after a line's end: it works for one file as
    for a thousand. Where a line or a row is one, a hash of its index, counted through all files, holds it out."""

    path: str = Field(min_length=1)
    column: str | None = None
    document: Literal["file", "line", "row"] | None = None
    val_fraction: float = Field(0.1, gt=0, lt=1)

    @property
    def name(self) -> str:
        return "files"

    def fingerprint(self) -> str:
        files = self._files()
        for path in files:
            self._refuse_unfit(path)
        digest = hashlib.sha256(b"2")  # the version of the rule by which files become documents
        for path in files:
            digest.update(_hash(path))
        return digest.hexdigest()

    def read(self) -> Iterator[Document]:
        index = 0
        for path in self._files():
            if self._unit(path) == "file":
                yield from self._file(path)
                continue
            table = format_of(path) is not None
            for name, text in cells(path, self.column or DEFAULT_COLUMN) if table else _lines(path):
                yield Document(name, text, drawn(index, self.val_fraction))
                index += 1

    def _unit(self, path: str) -> str:
        return self.document or ("row" if format_of(path) else "file")

    def _file(self, path: str) -> Iterator[Document]:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            cut = _cut(file, size, int(size * (1 - self.val_fraction)))
            for held_out, start, stop in ((False, 0, cut), (True, cut, size)):
                for i, text in enumerate(_parts(file, path, start, stop)):
                    yield Document(path, text, held_out, goes_on=i > 0)

    def _refuse_unfit(self, path: str) -> None:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty: remove it, or exclude it from data.path")
        if format_of(path):
            if self._unit(path) != "row":
                raise UserError(f"data.document={self.document} does not fit {path}, a table: choose row")
            refuse_no_column(path, self.column or DEFAULT_COLUMN)
        elif self.document == "row":
            raise UserError(f"data.document=row does not fit {path}, which is no table: choose file or line")
        elif self.column is not None:
            raise UserError(f"data.column={self.column} does not fit {path}, which is no table: leave it out")
        else:
            _refuse_other_kind(path)

    def _files(self) -> list[str]:
        found = sorted(
            path for path in glob.glob(os.path.expanduser(self.path), recursive=True) if os.path.isfile(path)
        )
        if not found:
            folder = os.path.isdir(os.path.expanduser(self.path))
            reason = f"is a folder: write {self.path}/*"
            if not folder:
                pattern = "data.path='books/*.txt'"
                reason = (
                    f"matches no file (looked from {os.getcwd()}): give a path or a quoted pattern, as in {pattern}"
                )
            raise UserError(f"data.path={self.path!r} {reason}")
        return found


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_other_kind(path: str) -> None:
    with _open(path) as file:
        head = _read(file, path, 8)
    for beginning, kind in NOT_TEXT.items():
        if head.startswith(beginning):
            raise UserError(f"{path} is {kind}, as its first bytes say: {WAY_OUT}")


def _hash(path: str) -> bytes:
    """SHA-256 of the file. Raises UserError where it should be text and is not."""
    digest, text = hashlib.sha256(), format_of(path) != "parquet"
    start, rest = 0, b""  # bytes decoded so far, and those of half a character after them
    with _open(path) as file:
        while True:
            block = _read(file, path, PART)
            digest.update(block)
            if text:
                used = len(_decoded(path, start, rest + block, final=not block)[1])
                start, rest = start + used, (rest + block)[used:]
            if not block:
                return digest.digest()


def _read(file: BinaryIO, path: str, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(path: str, start: int, content: bytes, final: bool) -> tuple[str, bytes]:
    """The text, and the bytes it is of: all where they are the final ones, else without half a character at the end."""
    if b"\0" in content:
        place = start + content.index(b"\0")
        raise UserError(f"{path} holds NUL bytes (the first at byte {place}), so it is not text: {WAY_OUT}")
    try:
        text, used = codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (at byte {start + error.start}): {WAY_OUT}") from None
    return text, content[:used]


def _cut(file: BinaryIO, size: int, goal: int) -> int:
    """The first byte of a line after `goal`; in one long line, the first byte of a character at or before it."""
    file.seek(goal)
    found = goal
    while block := file.read(PART):
        end = block.find(b"\n")
        if end >= 0:
            found += end + 1
            break
        found += len(block)
    if found < size:
        return found
    start = max(0, goal - 3)
    file.seek(start)
    around = file.read(goal - start + 1)
    while goal > start and goal < size and around[goal - start] & 0xC0 == 0x80:
        goal -= 1
    return goal


def _parts(file: BinaryIO, path: str, start: int, stop: int) -> Iterator[str]:
    """Bytes start ... stop - 1 as texts of at most PART bytes, cut after line ends where there are any."""
    file.seek(start)
    rest = b""
    while start < stop:
        block = rest + _read(file, path, min(PART - len(rest), stop - start - len(rest)))
        final = start + len(block) >= stop or not block
        cut = len(block) if final else block.rfind(b"\n") + 1 or len(block)
        text, used = _decoded(path, start, block[:cut], final)
        if not used:
            raise UserError(f"{path} changed while it was read: run again")
        yield text
        start, rest = start + len(used), block[len(used) :]


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """(path:line, its text without the line's end) of every line that has any."""
    start = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            text = _decoded(path, start, line, final=True)[0].rstrip("\r\n")
            start += len(line)
            if text:
                yield f"{path}:{number}", text
