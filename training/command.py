"""The command line's side of the border: one line for a user's mistake, whoever notices it. Imports nothing heavy."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from data.errors import UserError
from model.errors import NotFinite, Unsupported
from training.unknown import CONF, no_such_setting

_failed: list[str] = []  # what runs of this process's sweep could not do


@contextmanager
def one_line_errors(of_a_sweep: bool = False) -> Iterator[None]:
    """Turns a UserError, a kernel that does not run here, an output that is not finite, too little memory, or a
    complaint of Hydra's about what was typed, into one line on stderr and exit code 2, and Ctrl-C into one word and
    exit code 130. A reader of stdout that leaves early ends the program quietly. Anything else is a fault of the
    program and keeps its traceback.

    of_a_sweep: around one run of several; the sweep goes on after the line, and exits with 2 at its end.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would otherwise print over several lines
    argparse.ArgumentParser.error = Parser.error  # Hydra's own parser would print its usage as well
    line = None
    try:
        yield
    except (UserError, Unsupported, NotFinite) as error:
        line = str(error)
    except KeyboardInterrupt:
        with suppress(OSError):
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        line = _too_large(error) or _indeterminate(error) or _hydra_complaint(error)
        if line is None:
            raise
    if line is not None and of_a_sweep:
        _say(line)
        _failed.append(line)
    elif line is not None:
        fail(line)
    elif _failed and not of_a_sweep:
        _failed.clear()
        sys.exit(2)


def refuse_twice(typed: Sequence[str]) -> None:
    """Raises UserError where two of the overrides give one setting, or choose twice in one group: Hydra would take the
    last in silence."""
    given: dict[str, str] = {}
    for override in typed:
        key, equals, _ = override.lstrip("+").partition("=")
        key = key.strip().partition("@")[0]
        if not equals or key.startswith(("-", "~")):  # a flag; a setting that is taken away
            continue
        if key in given:
            sweep = ", or -m with a list of values to have a run of each" if given[key] != override else ""
            raise UserError(f"{given[key]} and {override} give {key} twice: leave one of them out{sweep}")
        given[key] = override


def plain_tree(cfg: Any) -> dict[str, Any]:
    """A composed Hydra configuration as plain values. Raises UserError for one that is incomplete."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give it a value, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None


def fail(line: str) -> NoReturn:
    """One line on stderr, and exit code 2."""
    _say(line)
    sys.exit(2)


def _say(line: str) -> None:
    with suppress(OSError):  # where nobody listens any more
        print(f"error: {' '.join(line.split())}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (python {self.prog} --help lists the options)")


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number between two limits, both allowed."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            fits = least <= value <= most and math.isfinite(value)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            upper = "" if most == math.inf else f" and at most {most}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word} of at least {least}{upper}")
        return value

    return parse


def _hydra_complaint(error: Exception) -> str | None:
    """One line for what Hydra raises over what was typed; None for anything else."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OverrideParseException):
        example = "'key=\"a=b\"'"
        return f"cannot read {error.override!r}: write key=value, and quote a value that holds = or commas: {example}"
    if not isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        return None
    for typed in sys.argv[1:]:
        key, equals, value = typed.partition("=")
        choices = sorted(path.stem for path in (CONF / key).glob("*.yaml")) if key.isidentifier() else []
        if equals and choices and not set(value.split(",")) <= set(choices):
            return f"{typed}: choose one of {', '.join(choices)}"
    unknown = re.search(r"Could not (?:override|append|delete)[^']* '([^']+)'", str(error))
    if unknown:
        return no_such_setting(unknown[1])
    return None if isinstance(error, ValueError) else str(error)


def _indeterminate(error: Exception) -> str | None:
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        return f"deterministic=true: {str(error).splitlines()[0].partition(', but you set')[0]}; try another kernel"
    return None


@contextmanager
def smaller_batches_advised(sequences: int, micro_batch_size: int) -> Iterator[None]:
    """Around training: turns too little memory into a UserError that says which micro_batch_size to try, of those that
    divide the sequences of a step, so that the step stays the same."""
    try:
        yield
    except Exception as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        smaller = max((n for n in range(1, micro_batch_size // 2 + 1) if sequences % n == 0), default=None)
        advice = "take a smaller model or a shorter model.context_length"
        if smaller is not None:
            advice = f"try micro_batch_size={smaller}, which trains on the same batch_tokens in smaller pieces"
        raise UserError(f"not enough memory for micro_batch_size={micro_batch_size}: {advice} ({reason})") from None


def out_of_memory(error: Exception) -> str | None:
    """In a few words, where that is what the error says, of a GPU or of the system."""
    if (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "t allocate memory" in str(error)
    ):
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return None


def _too_large(error: Exception) -> str | None:
    reason = out_of_memory(error)
    return reason and f"not enough memory: take a smaller model, or a smaller micro_batch_size ({reason})"
