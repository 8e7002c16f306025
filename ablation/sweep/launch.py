"""Run the cells of a sweep, each as a process of its own: python train.py with its overrides.

So a cell is what anybody could start by hand; its peak memory is its own; and one that fails, or that the system kills,
ends nothing else. Signals that reach the sweep are passed on to the cell, once each; if the sweep itself is killed, the
cell gets SIGTERM (on Linux), saves and stops.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Self

from common.atomic_io import exists
from common.errors import UserError
from common.invocation import ROOT
from common.lock import lock
from common.process import PARENT
from common.signals import SIGNALS

WAIT_FOR_LOCK = 60.0  # seconds for the process of a sweep that was killed to save and stop
Launcher = Callable[[Sequence[str]], int]  # the overrides of one run -> its exit code; -n where signal n ended it


class Interrupted(Exception):
    """The sweep was told to stop. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Relay:
    """A context manager around the cells of a sweep: it runs them, and passes signals on to the one that runs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.received: list[int] = []

    def __enter__(self) -> Self:
        handlers = dict.fromkeys(SIGNALS, self._stop) | {signal.SIGTSTP: self._suspend}
        handled = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self.before = {number: signal.signal(number, handlers[number]) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Call between two cells. Raises Interrupted where a signal came."""
        if self.received:
            raise Interrupted(self.received[0])

    def launch(self, overrides: Sequence[str]) -> int:
        """Run train.py with these overrides, its output being ours -> its exit code. Raises Interrupted where a signal
        reached us: the cell got it too, and has ended."""
        self.check()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C reaches the sweep alone, which passes it on
            env=os.environ | {PARENT: str(os.getpid())},
        )
        self.process = process
        if self.received:  # while the process was being made
            self._send(self.received[0])
        code = process.wait()
        self.process = None
        self.check()
        return code

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        self._send(number)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)  # when the sweep goes on, as by a shell's fg

    def _send(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):  # it has ended; the second is what macOS says then
                os.killpg(self.process.pid, number)


def wait_until_free(folder: Path) -> None:
    """Wait for a process that still trains in the folder: one that a killed sweep left saves and stops. Raises
    UserError where it goes on."""
    end = time.monotonic() + WAIT_FOR_LOCK
    while exists(folder):
        try:
            with lock(folder / ".lock", f"another process is training in {folder}: wait for it, or stop it first"):
                return
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
