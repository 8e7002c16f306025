"""Process start-up, before slow imports: checks of the machine, safe standard streams, and signals until training.

if __name__ == "__main__":
    from common import process

    process.start()
"""

import os
import signal
import sys

MIN_PYTHON = (3, 11)
PARENT = "HEADROOM_PARENT"  # environment variable: the process whose end stops this one, as a sweep's stops its run
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_owns_process = False  # not so in a test or a notebook that calls a program as a function
in_sweep = False  # a sweep started this process, and says itself what all its runs have in common


def start(*packages: str) -> None:
    """Set up the process: signals end it without a traceback, and its standard streams exist. Exits with code 2 where
    Python is too old, the working directory is gone, or one of `packages`, which the calling file imports, is not
    installed."""
    global _owns_process
    _owns_process = True
    end_at_once()
    _end_with_parent()
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        sys.stderr.write(f"error: Headroom needs Python {needed} or newer, this is {sys.version.split()[0]}\n")
        sys.exit(2)
    import importlib.util

    from common import ranks, streams
    from common.errors import reason
    from common.invocation import how_to_install

    ranks.hush()
    streams.replace_standard_streams()
    try:
        os.getcwd()
    except OSError as error:
        streams.print_stderr(f"error: the working directory is gone ({reason(error)}): cd to one that exists")
        sys.exit(2)
    for package in packages:
        if importlib.util.find_spec(package) is None:
            streams.print_stderr(f"error: {how_to_install(package)}")
            sys.exit(2)


def _end_with_parent() -> None:
    """Where PARENT names a process, have the system send SIGTERM when that ends, however it does. On Linux only."""
    global in_sweep
    parent = os.environ.pop(PARENT, "")
    in_sweep = bool(parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun's agent
        parent = parent or str(os.getppid())
    if not parent.isdecimal() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def end_at_once() -> None:
    """Make Ctrl-C and SIGTERM end the process immediately; Ctrl-C prints one word. For imports, when nothing can be
    lost: there some packages swallow an exception, and others turn it into another error."""
    _handle(_end)


def end_by_unwinding() -> None:
    """Make Ctrl-C and SIGTERM raise exceptions, so that temporary files are removed. Call it after imports."""
    _handle(_unwind)


def _handle(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM) if _owns_process else ():
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored by the shell, for a script's background jobs
            signal.signal(number, handler)


def _end(number, _frame) -> None:
    if number == signal.SIGINT:
        try:  # noqa: SIM105  (contextlib is not imported yet)
            os.write(2, b"interrupted\n")
        except OSError:  # no reader
            pass
    os._exit(128 + number)


def _unwind(number, _frame) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
