"""Signal handlers for a graceful stop: Ctrl-C, SIGTERM, as schedulers and `kill` send it, or a terminal that closes."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Self

from common import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised within a step or an evaluation that gives up because a signal came; nothing of it counts."""


class StopRequest:
    """A context manager that records the first signal, for the training loop to act on where nothing is lost. The
    second one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
            self.before = {number: signal.signal(number, self._receive) for number in handled}
        else:
            self.before = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int) -> None:
        """Record a signal that came to another process than this one; 0 is none."""
        if number and self.signal is None:
            self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """The shell's exit code of the signal: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.signal

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGTERM and ranks.size() > 1:
                return  # torchrun repeats it where another process has ended already
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        with suppress(OSError):  # nobody may be listening any more; and not print, which may be what was interrupted
            os.write(2, f"\n{self.signal.name}: stopping and saving; once more ends at once\n".encode())


class DeferredInterrupt:
    """A context manager that records the first Ctrl-C, for the generation loop to act on after the token: an exception
    could come between the text and the KV cache."""

    requested = False

    def __enter__(self) -> Self:
        self.before = signal.getsignal(signal.SIGINT)
        if self.before != signal.SIG_IGN:  # as in a script's background
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _receive(self, *_) -> None:
        if self.requested:  # the loop does not reach the end of a token
            raise KeyboardInterrupt
        self.requested = True
