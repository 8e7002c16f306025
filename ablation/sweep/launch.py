"""Run one cell of a sweep as a process of its own: python train.py with its overrides.

So a cell is what anybody could start by hand; its peak memory is its own; and one that fails, or that the system kills,
ends nothing else. Signals that reach the sweep are passed on to the cell, once each; if the sweep itself is killed, the
cell gets SIGTERM (on Linux), saves and stops.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.atomic_io import exists
from common.errors import UserError
from common.invocation import ROOT
from common.lock import lock

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WAIT_FOR_LOCK = 60.0  # seconds for the process of a sweep that was killed to save and stop
Launcher = Callable[[Sequence[str]], int]  # the overrides of one run -> its exit code; -n where signal n ended it


class Interrupted(Exception):
    """The sweep was told to stop, while a cell ran. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def launch(overrides: Sequence[str]) -> int:
    """Run train.py with these overrides, its output being ours. Raises Interrupted where a signal reached us: the cell
    got it too, and has ended."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        stdin=subprocess.DEVNULL,
        process_group=0,  # a terminal's Ctrl-C reaches the sweep alone, which passes it on
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    received: list[int] = []
    with _passing_on(process, received):
        code = process.wait()
    if received:
        raise Interrupted(received[0])
    return code


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen, received: list[int]) -> Iterator[None]:
    """A context in which signals go to the process; those that end it are recorded."""

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        _send(process, number)

    def suspend(_number: int, _frame: object) -> None:
        _send(process, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _send(process, signal.SIGCONT)  # when the sweep goes on, as in a shell's fg

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: stop, signal.SIGTSTP: suspend}
    handled = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, handlers[number]) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end_with_parent() -> None:
    """In the new process, before it becomes train.py: have the system send SIGTERM when the sweep's process ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
