"""The first thing that a program does, before it imports what takes seconds, and how signals end it until it trains.

if __name__ == "__main__":
    from common import process

    process.start()
"""

import os
import signal
import sys

OLDEST = (3, 11)
_in_charge = False  # of the process, which is one of the programs: not a test or a notebook that calls one


def start(*packages: str) -> None:
    """Readies the process: from here on a signal ends it in a word, its streams are there, and no file is opened in
    place of one. Ends it with exit code 2 where Python is too old, the working directory is gone, or one of the
    packages that the file itself imports is not installed."""
    global _in_charge
    _in_charge = True
    end_at_once()
    if sys.version_info < OLDEST:
        needed = ".".join(map(str, OLDEST))
        sys.stderr.write(f"error: Headroom needs Python {needed} or newer, this is {sys.version.split()[0]}\n")
        sys.exit(2)
    import importlib.util

    from common import streams
    from common.errors import reason
    from common.invocation import how_to_install

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


def end_at_once() -> None:
    """From here on Ctrl-C and SIGTERM end the process where it stands, with a word and without one. For when nothing
    can be lost: an exception amid imports is swallowed by one package and turned into another error by the next."""
    _handle(_end)


def end_by_unwinding() -> None:
    """From here on Ctrl-C and SIGTERM are exceptions: all is imported, and files may have to be removed."""
    _handle(_unwind)


def _handle(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM) if _in_charge else ():
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a script's background
            signal.signal(number, handler)


def _end(number, _frame) -> None:
    if number == signal.SIGINT:
        try:  # noqa: SIM105  (what suppresses would have to be imported before)
            os.write(2, b"interrupted\n")
        except OSError:  # nobody listens
            pass
    os._exit(128 + number)


def _unwind(number, _frame) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
