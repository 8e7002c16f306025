"""Stream JSON values from a file, decoded one at a time, so that the file need not fit into memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from data.sources import bounds

READ_CHARS = 2**16  # at one time, and more where a value is longer
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
MAX_WORD = 16  # characters: more than -Infinity or an escape has


def values(file: TextIO) -> Iterator[Any]:
    """The elements of a file's array, or its values one after another, each on one line or on several. Raises
    ValueError and RecursionError where it is not JSON, TooLong for a value that is too long, and the OSError and
    UnicodeDecodeError of reading."""
    text = _Text(file)
    if text.next() != "[":
        while text.next():
            yield text.value()
        return
    text.take("[")
    if text.next() == "]":
        text.take("]")
    else:
        yield text.value()
        while text.next() != "]":
            text.take(",")
            yield text.value()
        text.take("]")
    if text.next():
        raise ValueError("Extra data")


class _Text:
    """A buffer over a file, read as far as it is needed."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = ""
        self.at = 0

    def next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def take(self, character: str) -> None:
        if self.next() != character:
            raise ValueError(f"Expecting {character!r}")
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - MAX_WORD
                if not (cut and self._read()):
                    raise

    def _read(self) -> bool:
        held = len(self.text) - self.at
        if held >= bounds.MAX_LENGTH:
            raise bounds.TooLong
        more = self.file.read(min(max(READ_CHARS, held), bounds.MAX_LENGTH - held))
        self.text = self.text[self.at :] + more
        self.at = 0
        return bool(more)
