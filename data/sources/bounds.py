"""The bound on what is read as a whole, a line, a row or a value: a compressed file of a few bytes can hold one of any
length, as can a file that is damaged."""

from collections.abc import Iterator
from typing import IO, AnyStr

from common.errors import UserError

MAX_LENGTH = 2**27  # characters, or bytes where they are not decoded yet: a hundred times that of a long novel


class TooLong(ValueError):
    """A line, a row or a value is longer than MAX_LENGTH."""


def length_error(place: str, unit: str = "characters") -> UserError:
    """The error of what is longer. place: where it stands."""
    return UserError(
        f"{place} is longer than {MAX_LENGTH:,} {unit}, the most that is read as one: divide it, or exclude the file"
    )


def numbered_lines(path: str, file: IO[AnyStr]) -> Iterator[tuple[int, AnyStr]]:
    """The lines of a file, with their numbers from 1. Raises UserError for one that is too long."""
    number = 1
    while line := file.readline(MAX_LENGTH + 1):
        if len(line) > MAX_LENGTH:
            raise length_error(f"{path}:{number}", "bytes" if isinstance(line, bytes) else "characters")
        yield number, line
        number += 1
