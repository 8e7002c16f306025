"""Markup of HTML and SVG, built from elements: text is never taken for markup."""

import html
import json
from typing import Any

from common.errors import escaped

NEWLINE = "\n"  # stays in attributes only
VOID = ("meta", "link", "br", "input")  # elements without an end


class Markup(str):
    """A text that is markup already; any other text is escaped where it becomes part of some."""

    __slots__ = ()


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element. Underscores of attributes' names are hyphens (class_ is class); None and False leave one out, True
    sets it without a value."""
    start = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(start if name in VOID else f"{start}{join(*content)}</{name}>")


def join(*content: Any) -> Markup:
    """Several pieces, one after the other; None is nothing."""
    return Markup(
        "".join(piece if isinstance(piece, Markup) else _text(piece) for piece in content if piece is not None)
    )


def as_script(value: Any) -> Markup:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _text(value: Any, keep: str = "") -> str:
    return html.escape(escaped(str(value), keep))


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{_text(value, keep=NEWLINE)}"'
