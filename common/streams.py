"""The three standard streams as the programs need them: never missing, never failing where a message is written, and
never steering the terminal with characters of somebody else's. Imports nothing heavy."""

import errno
import io
import json
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common.errors import CONTROLS, escaped

LONG_WORD = re.compile(r"\S{2000,}")
LEFT = (errno.EPIPE, errno.ECONNRESET)  # the reader of a pipe or a socket is gone: it has what it wanted
_stdout: "_Stdout | None" = None


class StdoutLost(OSError):
    """What was to be written to stdout is lost: it is full, closed, or nobody reads it any more."""

    @property
    def reader_left(self) -> bool:
        return self.errno in LEFT


def replace_standard_streams() -> None:
    """Replaces sys.stdin, stdout and stderr. Call it once, before any file is opened: one that is opened while a stream
    is closed takes its number, and what was meant for the stream would be written into the file."""
    global _stdout
    # Where a stream was closed, its number reads or writes nothing, and says so, but errors are of no interest.
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if not os.get_blocking(0):  # where nothing is there yet, a text would seem to have ended
        os.set_blocking(0, True)
    _stdout = _Stdout(1, "w", closefd=False)
    sys.stdout, sys.stderr = _text(_stdout, sys.stdout), _text(_Stderr(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """In the encoding of the stream whose place it takes; characters that it lacks are written as escapes."""
    return io.TextIOWrapper(
        raw if before and before.write_through else io.BufferedWriter(raw),  # python -u
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=before.line_buffering if before else True,
        write_through=before.write_through if before else False,
    )


class _Waiting(io.FileIO):
    """Waits where a stream would not: another program may have made the terminal that they share non-blocking."""

    def write(self, data: bytes) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Stdout(_Waiting):
    """Raises StdoutLost once; what comes later is lost without a word, as the end of the process flushes again."""

    lost: StdoutLost | None = None
    excused = False  # the loss was dealt with

    def write(self, data: bytes) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = StdoutLost(error.errno, error.strerror)
                raise self.lost from None
        return len(data)


class _Stderr(_Waiting):
    """Where nothing can be written, or nobody reads, what is written is lost: a message is never worth a run."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def print_stderr(line: str) -> None:
    """One line on stderr. Of a word that nobody would read to its end, the middle is left out."""
    line = LONG_WORD.sub(lambda found: f"{found[0][:100]}[...]{found[0][-100:]}", line)
    with suppress(OSError):
        print(escaped(line), file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """One line of the program's own on stdout."""
    print(escaped(line), flush=True)


def escaped_for_terminal(text: str) -> str:
    """A text of somebody else's as stdout may have it: as it is, but on a terminal with control characters as
    escapes."""
    return escaped(text, keep="\t\n") if sys.stdout.isatty() else text


def show(text: str) -> None:
    """The same, written at once."""
    print(escaped_for_terminal(text), end="", flush=True)


def json_line(value: Any) -> str:
    """As JSON, readable, and with escapes for what would steer a terminal."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


@contextmanager
def all_written() -> Iterator[None]:
    """Around a program whose product is what it writes to stdout: raises StdoutLost where not all of it got there."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            _flush()
        else:
            with suppress(OSError):
                sys.stdout.flush()
        raise
    _flush()


def _flush() -> None:
    sys.stdout.flush()
    # Who wrote may have passed over the error, as argparse does.
    if _stdout is not None and _stdout.lost is not None and not _stdout.excused:
        raise _stdout.lost


def write_if_possible(text: str) -> OSError | None:
    """On stdout, where it is not the product: -> why it could not be written, if a reader still wanted it."""
    try:
        print(text, flush=True)
    except StdoutLost as error:
        _stdout.excused = True
        return None if error.reader_left else error
    return None
