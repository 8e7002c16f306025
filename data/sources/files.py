"""The user's own files: text, and tables with a column of text."""

import codecs
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.errors import UserError
from common.paths import is_folder, matching_files, raise_unreadable, working_folder
from common.suggestions import nearest
from data.sources import bounds
from data.sources.compression import content_name, open_bytes, open_text
from data.sources.corpus import Corpus, Document, HeldOutBy, SplitRule, is_held_out
from data.sources.kinds import AS_IT_IS, HEAD_BYTES, MARK, WAY_OUT, check_is_text, check_no_markup, check_no_nul
from data.sources.row_counts import RowCounts
from data.sources.tables import BINARY, check_column, format_of, rows

UNUSED_PROMPT_END = "\\n"  # as in conf/; another is refused without prompts
PART_BYTES = 2**24  # how much of a long file is in memory at one time
DEFAULT_COLUMN = "text"
UNITS = ("file", "line", "row")
SPLITS_FILE = "dataset_dict.json"  # of a folder that `datasets` saved several splits in
LINE_ENDS = "the lines end in \\r\\n: write that for each \\n"
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}  # how users type them


class FilesCorpus(Corpus):
    """Documents from files that a pattern matches.

    Where a file is one document, the last part of each file is held out, cut after a line end, so that it works for one
    file as for a thousand. Where a line, a row or the text between separators is one, a hash of its text holds it out
    (or a hash of its index, counted through all files).

    Fingerprint: SHA-256 over the bytes of the files. Settings are compared separately wherever fingerprints are.
    """

    path: str = Field(min_length=1)
    column: str | None
    prompt: str | None = Field(min_length=1)
    prompt_end: str
    document: str | None = Field(min_length=1)  # one of UNITS, or a separator
    val_fraction: float = Field(gt=0, lt=1)
    held_out_by: HeldOutBy
    reading: Literal[2, 3]  # the version of the rules by which files become documents

    @field_validator("document")
    @classmethod
    def _check_typo(cls, document: str | None) -> str | None:
        meant = nearest((document or "").lower(), UNITS)
        if meant and document not in UNITS and document.isalpha():
            raise ValueError(
                f"data.document={document}: did you mean {meant}? Give file, line, row, or a string that separates "
                "documents"
            )
        return document

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.prompt is None and self.prompt_end != UNUSED_PROMPT_END:
            raise ValueError(f"data.prompt_end={self.prompt_end!r} is of prompts: set data.prompt, or leave it out")
        if self.prompt == (self.column or DEFAULT_COLUMN):
            raise ValueError(
                f"data.prompt={self.prompt} is the column of the text too: name that of the answers as data.column="
            )
        return self

    @property
    def name(self) -> str:
        return "files"

    @property
    def has_prompts(self) -> bool:
        return self.prompt is not None

    def cache_key(self) -> dict[str, Any]:
        """The settings without those at the values of older versions, which had no key for them: their shards are
        found."""
        older = {"held_out_by": "index", "reading": 2, "prompt": None}.items()
        unused = {"prompt_end"} if self.prompt is None else None
        return {name: value for name, value in self.model_dump(exclude=unused).items() if (name, value) not in older}

    def sources(self) -> list[str]:
        return self._files()

    def split_rule(self) -> SplitRule | None:
        if self.held_out_by == "index":
            return None
        of_texts = any(self._unit(path) != "file" for path in self._files())
        rule = {name: value for name, value in self.cache_key().items() if name != "path"}
        return SplitRule(rule, self.val_fraction if of_texts else None)

    def fingerprint(self) -> str:
        files = self._files()
        for path in files:
            self._check_file(path)
        digest = hashlib.sha256(b"2")
        for path in files:
            digest.update(_hash(path))
        return digest.hexdigest()

    def read(self) -> Iterator[Document]:
        return self.read_counting(RowCounts())

    def read_counting(self, counts: RowCounts) -> Iterator[Document]:
        index = 0
        files = self._files()
        for path in files:
            if self._unit(path) == "file":
                yield from self._file_documents(path)
                continue
            for name, prompt, text in self._texts(path, counts):
                held_out = is_held_out(self.held_out_by, index, prompt or text, self.val_fraction)
                yield Document(name, prompt + text, held_out, prompt=len(prompt))
                index += 1
        if self.document not in (None, *UNITS) and index <= len(files):
            self._check_separator_found(files)

    def _unit(self, path: str) -> str:
        return self.document or ("row" if self._is_table(path) else "file")

    def _is_table(self, path: str) -> bool:
        """Whether the file is a table, by its suffix; a .json file is not one where it is read as text."""
        if format_of(path) == "json":
            return self.reading > 2 and self.document in (None, "row")
        return format_of(path) is not None

    def _texts(self, path: str, counts: RowCounts) -> Iterator[tuple[str, str, str]]:
        """The name, the prompt ("" without one) and the text of each document."""
        if self._is_table(path):
            yield from self._rows(path, counts)
            return
        if self.document == "line":
            texts = _lines(path) if self.reading > 2 else _lines(path, encoding="utf-8", ends="\n")
        else:
            texts = _separated(path, self._separator)
        for name, text in texts:
            yield name, "", text

    def _rows(self, path: str, counts: RowCounts) -> Iterator[tuple[str, str, str]]:
        """As `_texts`, of a table; rows that lack one of the columns are counted and skipped."""
        answer = f"column {self.column or DEFAULT_COLUMN}"
        lack = f"no text ({answer})"
        if self.prompt is not None:
            lack = f"no prompt (column {self.prompt}) or no answer ({answer})"
        for name, found in rows(path, self._columns):
            counts.add(lack, found is None)
            if found is not None:
                *prompt, text = found
                yield name, "".join(each + _unescaped(self.prompt_end) for each in prompt), text

    @property
    def _columns(self) -> dict[str, str]:
        """The columns that are read of a table, by the settings that name them."""
        prompt = {} if self.prompt is None else {"data.prompt": self.prompt}
        return prompt | {"data.column": self.column or DEFAULT_COLUMN}

    @property
    def _separator(self) -> str:
        return _unescaped(self.document)

    def _file_documents(self, path: str) -> Iterator[Document]:
        with _open(path) as file:
            size = _size(file, path)
            start = len(_mark(file, path)) if self.reading > 2 else 0
            cut = max(start, _cut(file, path, size, int(size * (1 - self.val_fraction))))
            for validation, first, stop in ((False, start, cut), (True, cut, size)):
                for i, text in enumerate(_parts(file, path, first, stop)):
                    yield Document(path, text, validation, is_continuation=i > 0)

    def _check_file(self, path: str) -> None:
        with _open(path) as file:
            head = _read(file, path, HEAD_BYTES)
        if not (head.removeprefix(MARK) if self.reading > 2 else head):
            raise UserError(f"{path} is empty: remove it, or exclude it from data.path")
        if format_of(path) not in BINARY:
            check_is_text(path, head)
        if self._is_table(path):
            self._check_table(path)
        else:
            self._check_text(path, head)

    def _check_table(self, path: str) -> None:
        if self._unit(path) != "row":
            raise UserError(f"data.document={self.document} does not fit {path}, a table: choose row")
        if format_of(path) in BINARY and content_name(path) != path:
            raise UserError(
                f"{path} is a table of {format_of(path)}, which compresses by itself: decompress it, and give it as "
                f"{content_name(path)}"
            )
        self._check_column(path)

    def _check_text(self, path: str, head: bytes) -> None:
        if self.document == "row":
            raise UserError(f"data.document=row does not fit {path}, which is no table: choose file or line")
        for setting, column in {"data.column": self.column, "data.prompt": self.prompt}.items():
            if column is not None:
                raise UserError(f"{setting}={column} does not fit {path}, which is no table: leave it out")
        if self.document is None and self.reading > 2:
            check_no_markup(path, head)

    def _check_column(self, path: str) -> None:
        try:
            for setting, column in self._columns.items():
                check_column(path, column, setting)
        except UserError as error:
            if format_of(path) != "json":
                raise
            raise UserError(f"{error}; or, {AS_IT_IS}") from None

    def _check_separator_found(self, files: list[str]) -> None:
        """Raises UserError where the separator splits none of the files."""
        if any(_has_separator(path, self._separator) for path in files):
            return
        way_out = "give one that does, or file, line or row"
        of_windows = self._separator.replace("\n", "\r\n")
        if of_windows != self._separator and any(_has_separator(path, of_windows) for path in files):
            way_out = LINE_ENDS
        raise UserError(
            f"data.document={self.document!r} is no separator in data.path={self.path!r}: it stands in none of the "
            f"files; {way_out}"
        )

    def _files(self) -> list[str]:
        found = matching_files(self.path) or _arrow_files(self.path)
        if found:
            return found
        path = os.path.expanduser(self.path)
        if os.path.exists(f"{path}/{SPLITS_FILE}"):
            reason = f"is a dataset of several splits: write {self.path}/train, or another of its folders"
        elif is_folder(path):
            reason = f"is a folder: write {self.path.rstrip('/')}/*"
        elif os.path.exists(path):
            reason = "is a pipe or a device, which cannot be read twice: write what it gives to a file"
        else:
            pattern = "data.path='books/*.txt'"
            reason = (
                f"matches no file (looked from {working_folder()}): give a path or a quoted pattern, as in {pattern}"
            )
        raise UserError(f"data.path={self.path!r} {reason}")


def _unescaped(text: str) -> str:
    """A text with line ends and tabs as they can be typed, such as \\n."""
    for typed, meant in ESCAPES.items():
        text = text.replace(typed, meant)
    return text


def _arrow_files(folder: str) -> list[str]:
    """The files of a dataset that `datasets` saved to a folder, without those in which it later kept results."""
    return [path for path in matching_files(f"{folder}/*.arrow") if not Path(path).name.startswith("cache-")]


def _open(path: str) -> BinaryIO:
    try:
        return open_bytes(path)
    except OSError as error:
        raise_unreadable(path, error)


def _hash(path: str) -> bytes:
    """SHA-256 of the file. Raises UserError where it should be text and is not."""
    digest = hashlib.sha256()
    is_text = format_of(path) not in BINARY
    start = 0  # bytes decoded so far
    rest = b""  # half a character after them
    with _open(path) as file:
        while True:
            block = _read(file, path, PART_BYTES)
            digest.update(block)
            if is_text:
                rest += block
                used = len(_decoded(path, start, rest, final=not block)[1])
                start += used
                rest = rest[used:]
            if not block:
                return digest.digest()


def _read(file: BinaryIO, path: str, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as error:
        raise_unreadable(path, error)


def _size(file: BinaryIO, path: str) -> int:
    """Bytes of the file's content. Afterwards it stands at its beginning."""
    size = _seek(file, path, 0, os.SEEK_END)
    _seek(file, path, 0)
    return size


def _seek(file: BinaryIO, path: str, offset: int, whence: int = os.SEEK_SET) -> int:
    try:
        return file.seek(offset, whence)
    except OSError as error:
        raise_unreadable(path, error)


def _mark(file: BinaryIO, path: str) -> bytes:
    """The byte order mark that the file begins with, if it does."""
    head = _read(file, path, len(MARK))
    return head if head == MARK else b""


def _decoded(path: str, start: int, content: bytes, final: bool) -> tuple[str, bytes]:
    """The text, and the bytes it was decoded from: all of the final ones, else without half a character at the end."""
    check_no_nul(path, start, content)
    try:
        text, used = codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (at byte {start + error.start}): {WAY_OUT}") from None
    return text, content[:used]


def _cut(file: BinaryIO, path: str, size: int, goal: int) -> int:
    """The byte where the first line after `goal` begins; in one long line, where the character at `goal` begins."""
    _seek(file, path, goal)
    found = goal
    while block := _read(file, path, PART_BYTES):
        end = block.find(b"\n")
        if end >= 0:
            found += end + 1
            break
        found += len(block)
    if found < size:
        return found
    start = max(0, goal - 3)
    _seek(file, path, start)
    around = _read(file, path, goal - start + 1)
    while goal > start and goal < size and around[goal - start] & 0xC0 == 0x80:
        goal -= 1
    return goal


def _parts(file: BinaryIO, path: str, start: int, stop: int) -> Iterator[str]:
    """Decode bytes start ... stop - 1 as texts of at most PART_BYTES, cut after line ends where there are any."""
    _seek(file, path, start)
    rest = b""
    while start < stop:
        block = rest + _read(file, path, min(PART_BYTES - len(rest), stop - start - len(rest)))
        final = start + len(block) >= stop or not block
        cut = len(block) if final else block.rfind(b"\n") + 1 or len(block)
        text, used = _decoded(path, start, block[:cut], final)
        if not used:
            raise UserError(f"{path} changed while it was read: run again")
        yield text
        start += len(used)
        rest = block[len(used) :]


def _lines(path: str, encoding: str = "utf-8-sig", ends: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield (path:line, text without the line end) of every line that has text. ends: None for \\n, \\r\\n and \\r."""
    try:
        with open_text(path, encoding, ends) as file:
            for number, line in bounds.numbered_lines(path, file):
                text = line.rstrip("\r\n")
                if text:
                    yield f"{path}:{number}", text
    except OSError as error:
        raise_unreadable(path, error)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text any more: {WAY_OUT}") from None


def _separated(path: str, separator: str) -> Iterator[tuple[str, str]]:
    """Yield (path:number, text) of every text between separators, without the line ends around it; those of white space
    alone are skipped. Raises UserError for one that is too long."""
    for number, text in enumerate(_split(path, separator), 1):
        if len(text) > bounds.MAX_LENGTH:
            raise bounds.length_error(f"{path}:{number}")
        if text.strip():
            yield f"{path}:{number}", text.strip("\r\n")


def _has_separator(path: str, separator: str) -> bool:
    return len(list(itertools.islice(_split(path, separator), 2))) > 1


def _split(path: str, separator: str) -> Iterator[str]:
    """str.split of a file's text, with only a part of the file and the text that it ends in memory. Raises UserError
    for a text that is too long, as far as it is read."""
    with _open(path) as file:
        size = _size(file, path)
        number = 1
        rest = ""
        for part in _parts(file, path, len(_mark(file, path)), size):
            *texts, rest = (rest + part).split(separator)
            yield from texts
            number += len(texts)
            if len(rest) >= bounds.MAX_LENGTH + len(separator):  # whose beginning may end it
                place = f"{path}:{number}"
                raise bounds.length_error(place) if number > 1 else _no_separator_error(path, separator, rest)
        yield rest


def _no_separator_error(path: str, separator: str, text: str) -> UserError:
    """The error of a file that begins with a text, already too long, in which no separator stands."""
    ends_otherwise = separator.replace("\n", "\r\n") in text
    return UserError(
        f"data.document={separator!r} is no separator in {path}: it does not stand in its first {bounds.MAX_LENGTH:,} "
        "characters, the most that is read as one; "
        f"{LINE_ENDS if ends_otherwise else 'give one that does, or file or line, or exclude the file'}"
    )
