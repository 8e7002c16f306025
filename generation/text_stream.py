"""Streaming detokenization: decode tokens to complete characters, and wait where a stop string may follow."""

import codecs
from collections.abc import Sequence

from data.tokenizers.base import Tokenizer
from generation.stop_strings import find_stop_string, split_partial_stop


class TextStream:
    """The text of one row. It ends before the first stop string to be complete (of several that end at the same
    character, before the longest), whichever tokens spell it. Stop strings are looked for in what is written, not in
    what was there before."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), incomplete_bytes: bytes = b""):
        """incomplete_bytes: the first bytes of a character that the previous turn cut off and this text completes."""
        self.tokenizer = tokenizer
        self.stops = stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # waits for a character's last byte
        self.decoder.decode(incomplete_bytes)
        self.text = ""  # returned so far
        self.pending = ""  # decoded, but may become a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """Decode one token -> the text that no stop string can change any more, pending text included."""
        return self._advance(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """End the text -> the rest of it. An incomplete character is left out."""
        rest = self.pending
        self.pending = ""
        self.text += rest
        return rest

    @property
    def incomplete_bytes(self) -> bytes:
        """The first bytes of a character that is not complete yet."""
        return self.decoder.getstate()[0]

    def _advance(self, fresh: str) -> str:
        if self.stopped:
            return ""
        text = self.pending + fresh
        stop = find_stop_string(text, self.stops)
        if stop is not None:
            certain = text[:stop]
            self.pending = ""
            self.stopped = True
        else:
            certain, self.pending = split_partial_stop(text, self.stops)
        self.text += certain
        return certain
