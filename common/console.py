"""What a program announces on stderr, and how numbers are written for a person."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from common.streams import print_stderr

log = logging.getLogger("headroom")


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{fraction:.1%}"


def clock(seconds: float) -> str:
    """As in 2:05, or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class _Stderr(logging.Handler):
    """Looks sys.stderr up at every message: a live line replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_stderr(self.format(record))


@contextmanager
def deferred_logging() -> Iterator[None]:
    """What is announced within comes after it, not amid a text that streams."""
    handlers = log.handlers[:]
    held = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)
    log.handlers[:] = [held]
    try:
        yield
    finally:
        log.handlers[:] = handlers
        for record in held.buffer:
            log.handle(record)


def to_stderr() -> None:
    """What the program announces goes to stderr, a plain line each."""
    log.handlers[:] = [_Stderr()]
    log.setLevel(logging.INFO)
    log.propagate = False
