"""Command-line parsing, and one line on stderr for a user's mistake, whoever notices it. Imports nothing heavy."""

import argparse
import errno
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from common import process, ranks
from common.errors import NotFinite, Unsupported, UserError, reason
from common.invocation import ROOT, command, how_to_install
from common.streams import StdoutLost, all_written, print_stderr
from common.suggestions import hint, nearest

BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# Errors of files and disks, which are no fault of the program.
FILE_FAULTS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
FILE_FAULTS += (errno.EIO, errno.ESTALE, errno.ELOOP, errno.EMFILE, errno.ENFILE)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, a kernel that does not run here, an output that is not finite, too little memory, a package
    that is not installed, or a file or a stdout that cannot be read or written, into one line on stderr and exit code
    2, and Ctrl-C into one word and exit code 130. A reader of stdout that leaves early ends the program quietly.
    Anything else is a fault of the program and keeps its traceback."""
    line = None
    try:
        with all_written():
            yield
    except KeyboardInterrupt:
        process.end_at_once()
        print_stderr("interrupted")
        sys.exit(130)
    except StdoutLost as error:
        if not error.reader_left:
            fail(f"stdout cannot be written: {reason(error)}")
        sys.exit(0)
    except Exception as error:
        line = _user_line(error)
        if line is None:
            ranks.speak_of_fault()
            raise
    process.end_at_once()
    if line is not None:
        fail(line)


def _user_line(error: Exception) -> str | None:
    """Return the line to print for an error that is no fault of the program; None for one that is."""
    if isinstance(error, UserError | Unsupported | NotFinite):
        return str(error)
    known = (_too_large, _nondeterministic, _not_installed, _file_fault)
    return next((line for line in (explain(error) for explain in known) if line), None)


def fail(line: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print_stderr(f"error: {ranks.speak_of_fault()}{line}")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, without its usage, and names the flag that is meant."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} ({command(self.prog, '--help')} lists the options)")

    def parse_args(self, *given: Any, **named: Any) -> Any:
        known, rest = self.parse_known_args(*given, **named)
        if rest:
            self.refuse(rest)
        return known

    def refuse(self, words: Sequence[str], advice: str = "") -> NoReturn:
        """Report words that are no arguments. advice: the way out, where none of them is a slip of a flag."""
        advice = self._meant(words) or advice
        self.error(f"unrecognized arguments: {' '.join(words)}{advice and f': {advice}'}")

    def _meant(self, words: Sequence[str]) -> str:
        """The question which flag the first of the words that looks like one is a slip of; empty where none is near."""
        typed = next((word for word in words if word.startswith("-")), "").partition("=")[0]
        flags = {flag.strip("-"): flag for action in self._actions for flag in action.option_strings}
        return hint(flags.get(nearest(typed.strip("-").replace("_", "-"), flags)))


def number(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Make an argparse type: a finite number between two limits, both allowed."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            fits = minimum <= value <= maximum and math.isfinite(value)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            upper = "" if maximum == math.inf else f" and at most {maximum}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word} of at least {minimum}{upper}")
        return value

    return parse


def byte_count(text: str) -> int:
    """An argparse type: a number of bytes, as 5000000, 5MB or 4.5 GiB."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([a-z]*)", text.strip().lower())
    digits, unit = ("0", "") if found is None else found.groups()
    whole = BYTES.get(unit, 0) > 1 or "." not in digits  # bytes have no parts
    count = int(Decimal(digits) * BYTES.get(unit, 0)) if whole else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: write it as 500MB, 2GiB or 5000000")
    return count


def _file_fault(error: Exception) -> str | None:
    if not isinstance(error, OSError) or error.errno not in FILE_FAULTS:
        return None
    return f"{error.filename}: {reason(error)}" if error.filename else reason(error)


def _not_installed(error: Exception) -> str | None:
    """Return how to install a third-party package that is missing; None for any other error."""
    package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if package is None or (ROOT / package).exists() or importlib.util.find_spec(package) is not None:
        return None
    return how_to_install(package, _importing_file(error))


def _importing_file(error: Exception) -> str:
    """The file of this project that imported what is missing, from the project's folder."""
    files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__))
    ours = [file for file in files if file.is_relative_to(ROOT) and "site-packages" not in file.parts]
    return str(ours[-1].relative_to(ROOT)) if ours else ""


def _nondeterministic(error: Exception) -> str | None:
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        return f"deterministic=true: {str(error).splitlines()[0].partition(', but you set')[0]}; try another kernel"
    return None


@contextmanager
def smaller_batches_advised(sequences: int, micro_batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error of training into a UserError that names the next smaller micro_batch_size, of those
    that divide the sequences of a step, so that the step stays the same."""
    try:
        yield
    except Exception as error:
        shortage = out_of_memory(error)
        if shortage is None:
            raise
        smaller = max((n for n in range(1, micro_batch_size // 2 + 1) if sequences % n == 0), default=None)
        advice = "take a smaller model or a shorter model.context_length"
        if smaller is not None:
            advice = f"try micro_batch_size={smaller}, which trains on the same batch_tokens in smaller pieces"
        raise UserError(f"not enough memory for micro_batch_size={micro_batch_size}: {advice} ({shortage})") from None


def out_of_memory(error: Exception) -> str | None:
    """Return a short description of an out-of-memory error, of a GPU or of the system; None for any other error."""
    if (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "t allocate memory" in str(error)
    ):
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return None


def _too_large(error: Exception) -> str | None:
    shortage = out_of_memory(error)
    return shortage and f"not enough memory: take a smaller model, or a smaller micro_batch_size ({shortage})"
