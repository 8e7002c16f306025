"""What is shown to the user as one line, without a traceback, and what may not reach a terminal as it is."""

import errno
import re

# What steers a terminal (C0, DEL, C1), ends a line, reorders what is read (bidirectional overrides and isolates), or
# cannot be encoded (lone surrogates, which stand for the bytes of a file name that is not UTF-8).
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

LONGEST = 4000  # characters; what a file holds may be quoted, and be of any length


class UserError(Exception):
    """A mistake of the user's or a fault of a file: the message names the value, the limit and the way out. It is one
    line, also where the value it quotes is several: they and other control characters are shown as escapes."""

    def __init__(self, message: str):
        line = escaped(message)
        if len(line) > LONGEST:  # how it begins, and the way out
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)


def reason(error: OSError) -> str:
    """Why a file, a folder or a stream cannot be read or written."""
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error) or type(error).__name__


def escaped(text: str, keep: str = "") -> str:
    """The text with each control character as Python writes it, such as \\x1b or \\n, but for those in `keep`."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Unsupported(ValueError):
    """A choice that this device, dtype or shape does not have; the message says what to choose instead."""


class NotFinite(ArithmeticError):
    """A model's output holds NaN, or rules out every token, so nothing follows from it; the message says where."""


def in_part(key: str, message: str) -> str:
    """A complaint about a part of a stack or a mix, as attention.parts.local, in terms of that part's own settings."""
    message = message.replace(f"{key.partition('.')[0]}.", f"{key}.")
    return message if key in message else f"{key}: {message}"
