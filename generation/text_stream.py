"""Text as it is written: tokens in, whole characters out, and nothing that may yet turn out to be a stop string."""

import codecs
from collections.abc import Sequence

from data.tokenizers.base import Tokenizer


class TextStream:
    """The text of one row. It ends before the first stop string to be complete (of several that end at the same
    character, before the longest), whichever tokens spell it. Stop strings are looked for in what is written, not in
    what was there before."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), half: bytes = b""):
        """half: the bytes of a character that an earlier text left incomplete, and this one goes on with."""
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character
        self.decoder.decode(half)
        self.text = ""  # what was handed out
        self.held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """-> what is now certain to belong to the text, of this token and of those held back."""
        return self._advance(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """-> the rest, where no more tokens will come. Half a character is left out."""
        rest, self.held = self.held, ""
        self.text += rest
        return rest

    @property
    def half(self) -> bytes:
        """The first bytes of a character whose others have not come."""
        return self.decoder.getstate()[0]

    def _advance(self, fresh: str) -> str:
        if self.stopped:
            return ""
        pending = self.held + fresh
        found = [(pending.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in pending]
        if found:
            end, negative_length = min(found)
            certain, self.held, self.stopped = pending[: end + negative_length], "", True
        else:
            certain, self.held = _split(pending, self.stops)
        self.text += certain
        return certain


def _split(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """The text, and the longest end of it with which a stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:]
    return text, ""
