"""Files of the user's own: text, and tables with a column of text."""

import codecs
import difflib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field, field_validator

from common.errors import UserError
from common.paths import is_folder, matching_files, raise_unreadable, working_folder
from data.sources.corpus import Corpus, Document, HeldOutBy, SplitRule, is_held_out
from data.sources.kinds import AS_IT_IS, HEAD, MARK, WAY_OUT, refuse_markup, refuse_nul, refuse_other_kind
from data.sources.tables import cells, format_of, refuse_no_column

PART = 2**24  # bytes of a long file in memory at one time
DEFAULT_COLUMN = "text"
UNITS = ("file", "line", "row")
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}  # as they can be typed


class FilesCorpus(Corpus):
    """Where a file is one document, the last part of each is held out, cut after a line's end: it works for one file as
    for a thousand. Where a line, a row or what stands between separators is one, a hash of it holds it out (or of its
    index, counted through all files).

    Fingerprint: of the bytes of the files. The settings are compared by themselves wherever fingerprints are.
    """

    path: str = Field(min_length=1)
    column: str | None = None
    document: str | None = Field(None, min_length=1)  # of UNITS, or a separator
    val_fraction: float = Field(0.1, gt=0, lt=1)
    held_out_by: HeldOutBy = "content"
    reading: Literal[2, 3] = 3  # the version of the rules by which files become documents

    @field_validator("document")
    @classmethod
    def _no_slip(cls, document: str | None) -> str | None:
        meant = difflib.get_close_matches((document or "").lower(), UNITS, n=1, cutoff=0.75)
        if meant and document not in UNITS and document.isalpha():
            raise ValueError(
                f"data.document={document}: did you mean {meant[0]}? Give file, line, row, or a string that separates "
                "documents"
            )
        return document

    @property
    def name(self) -> str:
        return "files"

    def cache_key(self) -> dict[str, Any]:
        """Without what is as it was before it was a setting, so that what was prepared then is found."""
        before = {"held_out_by": "index", "reading": 2}.items()
        return {name: value for name, value in super().cache_key().items() if (name, value) not in before}

    def sources(self) -> list[str]:
        return self._files()

    def split_rule(self) -> SplitRule | None:
        if self.held_out_by == "index":
            return None
        of_texts = any(self._unit(path) != "file" for path in self._files())
        rule = self.model_dump(exclude={"path", "document_mask"})
        return SplitRule(rule, self.val_fraction if of_texts else None)

    def fingerprint(self) -> str:
        files = self._files()
        for path in files:
            self._refuse_unfit(path)
        digest = hashlib.sha256(b"2")
        for path in files:
            digest.update(_hash(path))
        return digest.hexdigest()

    def read(self) -> Iterator[Document]:
        index, files = 0, self._files()
        for path in files:
            if self._unit(path) == "file":
                yield from self._file(path)
                continue
            for name, text in self._texts(path):
                yield Document(name, text, is_held_out(self.held_out_by, index, text, self.val_fraction))
                index += 1
        if self.document not in (None, *UNITS) and index <= len(files):
            self._refuse_no_separator(files)

    def _unit(self, path: str) -> str:
        return self.document or ("row" if self._is_table(path) else "file")

    def _is_table(self, path: str) -> bool:
        """A .json file is one unless it is asked for as text."""
        if format_of(path) == "json":
            return self.reading > 2 and self.document in (None, "row")
        return format_of(path) is not None

    def _texts(self, path: str) -> Iterator[tuple[str, str]]:
        if self._is_table(path):
            return cells(path, self.column or DEFAULT_COLUMN)
        if self.document == "line":
            return _lines(path) if self.reading > 2 else _lines(path, encoding="utf-8", ends="\n")
        return _separated(path, self._separator)

    @property
    def _separator(self) -> str:
        found = self.document
        for typed, meant in ESCAPES.items():
            found = found.replace(typed, meant)
        return found

    def _file(self, path: str) -> Iterator[Document]:
        with _open(path) as file:
            size, start = os.fstat(file.fileno()).st_size, len(_mark(file, path)) if self.reading > 2 else 0
            cut = max(start, _cut(file, path, size, int(size * (1 - self.val_fraction))))
            for validation, first, stop in ((False, start, cut), (True, cut, size)):
                for i, text in enumerate(_parts(file, path, first, stop)):
                    yield Document(path, text, validation, is_continuation=i > 0)

    def _refuse_unfit(self, path: str) -> None:
        with _open(path) as file:
            head = _read(file, path, HEAD)
        if not (head.removeprefix(MARK) if self.reading > 2 else head):
            raise UserError(f"{path} is empty: remove it, or exclude it from data.path")
        if format_of(path) != "parquet":
            refuse_other_kind(path, head)
        if self._is_table(path):
            if self._unit(path) != "row":
                raise UserError(f"data.document={self.document} does not fit {path}, a table: choose row")
            self._refuse_no_column(path)
        elif self.document == "row":
            raise UserError(f"data.document=row does not fit {path}, which is no table: choose file or line")
        elif self.column is not None:
            raise UserError(f"data.column={self.column} does not fit {path}, which is no table: leave it out")
        elif self.document is None and self.reading > 2:
            refuse_markup(path, head)

    def _refuse_no_column(self, path: str) -> None:
        try:
            refuse_no_column(path, self.column or DEFAULT_COLUMN)
        except UserError as error:
            if format_of(path) != "json":
                raise
            raise UserError(f"{error}; or, {AS_IT_IS}") from None

    def _refuse_no_separator(self, files: list[str]) -> None:
        """Where each file came as one document at most, though it was to be several."""
        if not any(len(list(itertools.islice(_split(path, self._separator), 2))) > 1 for path in files):
            raise UserError(
                f"data.document={self.document!r} is no separator in data.path={self.path!r}: it stands in none of the "
                "files; give one that does, or file, line or row"
            )

    def _files(self) -> list[str]:
        found = matching_files(self.path)
        if found:
            return found
        path = os.path.expanduser(self.path)
        if is_folder(path):
            reason = f"is a folder: write {self.path}/*"
        elif os.path.exists(path):
            reason = "is a pipe or a device, which cannot be read twice: write what it gives to a file"
        else:
            pattern = "data.path='books/*.txt'"
            reason = (
                f"matches no file (looked from {working_folder()}): give a path or a quoted pattern, as in {pattern}"
            )
        raise UserError(f"data.path={self.path!r} {reason}")


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise_unreadable(path, error)


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
        raise_unreadable(path, error)


def _mark(file: BinaryIO, path: str) -> bytes:
    """The byte order mark that the file begins with, if it does."""
    head = _read(file, path, len(MARK))
    return head if head == MARK else b""


def _decoded(path: str, start: int, content: bytes, final: bool) -> tuple[str, bytes]:
    """The text, and the bytes it is of: all where they are the final ones, else without half a character at the end."""
    refuse_nul(path, start, content)
    try:
        text, used = codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (at byte {start + error.start}): {WAY_OUT}") from None
    return text, content[:used]


def _cut(file: BinaryIO, path: str, size: int, goal: int) -> int:
    """The first byte of a line after `goal`; in one long line, the first byte of a character at or before it."""
    file.seek(goal)
    found = goal
    while block := _read(file, path, PART):
        end = block.find(b"\n")
        if end >= 0:
            found += end + 1
            break
        found += len(block)
    if found < size:
        return found
    start = max(0, goal - 3)
    file.seek(start)
    around = _read(file, path, goal - start + 1)
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


def _lines(path: str, encoding: str = "utf-8-sig", ends: str | None = None) -> Iterator[tuple[str, str]]:
    """(path:line, its text without the line's end) of every line that has any. ends: None for \\n, \\r\\n and \\r."""
    try:
        with open(path, encoding=encoding, newline=ends) as file:
            for number, line in enumerate(file, 1):
                text = line.rstrip("\r\n")
                if text:
                    yield f"{path}:{number}", text
    except OSError as error:
        raise_unreadable(path, error)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text any more: {WAY_OUT}") from None


def _separated(path: str, separator: str) -> Iterator[tuple[str, str]]:
    """(path:number, text) of what stands between separators, without the line ends around it, where that is more than
    white space."""
    for number, text in enumerate(_split(path, separator), 1):
        if text.strip():
            yield f"{path}:{number}", text.strip("\r\n")


def _split(path: str, separator: str) -> Iterator[str]:
    """As str.split would, with no more in memory than a part of the file and the text that it ends."""
    with _open(path) as file:
        rest, start, size = "", len(_mark(file, path)), os.fstat(file.fileno()).st_size
        for part in _parts(file, path, start, size):
            *texts, rest = (rest + part).split(separator)
            yield from texts
        yield rest
