"""Errors shown to the user as one line without a traceback, and escapes for control characters."""

import errno
import re

# Characters that control a terminal (C0, DEL, C1), end a line, reorder text (bidirectional overrides and isolates), or
# cannot be encoded (lone surrogates, which stand for the bytes of a file name that is not UTF-8).
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

MAX_LENGTH = 4000  # characters of a message: it may quote a file's content, of any length


class UserError(Exception):
    """A user's mistake or a fault of a file: the message names the value, the limit and the way out. It is always one
    line: line ends and other control characters in a quoted value become escapes."""

    def __init__(self, message: str):
        line = escaped(message)
        if len(line) > MAX_LENGTH:  # keep the beginning, and the way out
            line = f"{line[: MAX_LENGTH // 2]} ... {line[-MAX_LENGTH // 2 :]}"
        super().__init__(line)


class NotFetched(UserError):
    """What must be fetched before a run can begin is not there: the documents of the hub, or a published vocabulary.
    A dry run reports it and goes on."""


def reason(error: OSError) -> str:
    """The reason of an OSError, in words."""
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error) or type(error).__name__


def escaped(text: str, keep: str = "") -> str:
    """The text with each control character, except those in `keep`, as a Python escape such as \\x1b or \\n."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Unsupported(ValueError):
    """A choice that this device, dtype or shape does not support; the message says what to choose instead."""


class NotFinite(ArithmeticError):
    """A model's output contains NaN, or rules out every token, so that none can be chosen; the message says where."""


def in_part(key: str, message: str) -> str:
    """A complaint about a part of a stack or a mix, as attention.parts.local, in terms of that part's own settings."""
    message = message.replace(f"{key.partition('.')[0]}.", f"{key}.")
    return message if key in message else f"{key}: {message}"
