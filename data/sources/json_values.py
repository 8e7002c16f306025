"""The JSON values of a text, decoded one at a time: a file need not fit into memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

BLOCK = 2**16  # characters read at one time, and more where a value is longer
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16  # characters: more than -Infinity or the escape of a character take


def values(file: TextIO) -> Iterator[Any]:
    """The elements of the array that a file is, or the values that stand in it one after another, whether each is on
    a line of its own or on several. Raises ValueError and RecursionError where it is not JSON, and what reading
    raises."""
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
    """What is left of a file, read as far as it is needed."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at = file, "", 0

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
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
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_WORD
                if not (cut and self._read()):
                    raise

    def _read(self) -> bool:
        more = self.file.read(max(BLOCK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)
