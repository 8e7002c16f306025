"""Safe standard streams: never missing, never failing while a message is written, and never passing control characters
of other programs' text to the terminal. Imports nothing heavy."""

import atexit
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
READER_GONE = (errno.EPIPE, errno.ECONNRESET)  # the reader of a pipe or a socket has closed it: it has all it wanted
_stdout: "_Stdout | None" = None


class StdoutLost(OSError):
    """Output to stdout is lost: its disk is full, it is closed, or its reader is gone."""

    @property
    def reader_left(self) -> bool:
        return self.errno in READER_GONE


def replace_standard_streams() -> None:
    """Replace sys.stdin, stdout and stderr. Call it once, before any file is opened: a file that is opened while a
    stream is closed takes its descriptor, and output meant for the stream would be written into the file."""
    global _stdout
    # A closed stdin or stdout gets a descriptor that fails on use, so that the loss is noticed; stderr discards.
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    if not os.get_blocking(0):  # or input that has not arrived yet would look like the end of input
        os.set_blocking(0, True)
        atexit.register(os.set_blocking, 0, False)  # the program that shares it may rely on it
    _stdout = _Stdout(1, "w", closefd=False)
    sys.stdout = _text(_stdout, sys.stdout)
    sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A text stream in the encoding of the one that it replaces; characters that this lacks are written as escapes."""
    return io.TextIOWrapper(
        raw if before and before.write_through else io.BufferedWriter(raw),  # python -u
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=before.line_buffering if before else True,
        write_through=before.write_through if before else False,
    )


class _Blocking(io.FileIO):
    """Blocks even on a non-blocking descriptor: another program may have made the terminal that they share one."""

    def write(self, data: bytes) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Stdout(_Blocking):
    """Raises StdoutLost once and silently drops later output, because the end of the process flushes again."""

    lost: StdoutLost | None = None
    handled = False  # the caller has dealt with the loss

    def write(self, data: bytes) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = StdoutLost(error.errno, error.strerror)
                raise self.lost from None
        return len(data)


class _Stderr(_Blocking):
    """Silently drops output that cannot be written: a message must never end a run."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def print_stderr(line: str) -> None:
    """Print one line on stderr. Words of 2000 characters and more are shortened in the middle."""
    line = LONG_WORD.sub(lambda found: f"{found[0][:100]}[...]{found[0][-100:]}", line)
    with suppress(OSError):
        print(escaped(line), file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """Print one line that the program wrote itself on stdout."""
    print(escaped(line), flush=True)


def escaped_for_terminal(text: str) -> str:
    """Text that the program did not write itself, for stdout: on a terminal control characters become escapes."""
    return escaped(text, keep="\t\n") if sys.stdout.isatty() else text


def show(text: str) -> None:
    """Write text that the program did not write itself to stdout, and flush."""
    print(escaped_for_terminal(text), end="", flush=True)


def json_line(value: Any) -> str:
    """One line of readable JSON, with escapes for characters that control a terminal."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


@contextmanager
def all_written() -> Iterator[None]:
    """A context for a program whose product is its stdout: raises StdoutLost where some of it could not be written."""
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
    # The writer may have ignored the error, as argparse does.
    if _stdout is not None and _stdout.lost is not None and not _stdout.handled:
        raise _stdout.lost


def write_if_possible(text: str) -> OSError | None:
    """Print text on stdout that is not the program's product -> the error, unless the reader itself closed the pipe."""
    try:
        print(text, flush=True)
    except StdoutLost as error:
        _stdout.handled = True
        return None if error.reader_left else error
    return None
