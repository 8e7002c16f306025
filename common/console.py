"""Logging to stderr, and numbers formatted for people."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from common.streams import print_stderr

log = logging.getLogger("headroom")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: 1 step, 2 steps, 1,024 tokens. plural: where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    exponent = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def clock(seconds: float) -> str:
    """Format a duration, as in 2:05, or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class _Stderr(logging.Handler):
    """A handler that looks sys.stderr up at every message: a live line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_stderr(self.format(record))


@contextmanager
def deferred_logging() -> Iterator[None]:
    """Delay log messages until the end of the `with` block: they would come amid a text that streams."""
    handlers = log.handlers[:]
    buffering = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)
    log.handlers[:] = [buffering]
    try:
        yield
    finally:
        log.handlers[:] = handlers
        for record in buffering.buffer:
            log.handle(record)


def about(seconds: float) -> str:
    """Format an estimated duration in one unit: 25 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def level_of_log(level: int) -> Iterator[None]:
    """A context in which only messages of at least this level are logged."""
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def to_stderr(level: int = logging.INFO) -> None:
    """Send the program's log messages of at least this level to stderr, one line each."""
    log.handlers[:] = [_Stderr()]
    log.setLevel(level)
    log.propagate = False
