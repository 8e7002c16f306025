"""The score of a text as lines: a table of its tokens, JSON objects, and the summary."""

import math
import unicodedata
from collections.abc import Iterator
from typing import Any

from data.tokenizers.base import Tokenizer
from generation.scoring import TokenScore
from model.score import Score

TOKEN_WIDTH = 16  # columns; a longer token moves what follows it
HEADER = f"{'number':>9}{'nats':>9}{'probability':>13}{'rank':>8}  {'token':{TOKEN_WIDTH}}  likeliest others"


class TokenLines:
    """Formats the tokens of a text, as they come, as lines of a table or as JSON values."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.number = 1  # of the next token in the text

    def table(self, scores: list[TokenScore]) -> Iterator[str]:
        """A line for each token, the header before the first one. Control characters are escaped."""
        for score in scores:
            if self.number == 1:
                yield HEADER
            numbers = f"{_number(score.nats, '.4f'):>9}{percent(score.probability):>13}{_number(score.rank, ','):>8}"
            name = _padded(shown(self.tokenizer.decode_bytes([score.token])))
            yield f"{self.number:>9,}{numbers}  {name}  {others(score, self.tokenizer)}".rstrip()
            self.number += 1

    def json(self, scores: list[TokenScore]) -> Iterator[dict[str, Any]]:
        """A dictionary for each token. What is not known of it, or not finite, is null."""
        for score in scores:
            yield {
                "number": self.number,
                **self._named(score.token),
                "nats": score.nats if score.rank is not None else None,
                "probability": score.probability,
                "rank": score.rank,
                "others": [self._named(token) | {"probability": share} for token, share in score.others],
            }
            self.number += 1

    def _named(self, token: int) -> dict[str, Any]:
        """A token's number and its text, which has U+FFFD for a part of a character; `hex` are its bytes."""
        content = self.tokenizer.decode_bytes([token])
        return {"token": token, "text": content.decode(errors="replace"), "hex": content.hex()}


def others(score: TokenScore, tokenizer: Tokenizer) -> str:
    """The likeliest other tokens, each with its probability."""
    return "  ".join(f"{shown(tokenizer.decode_bytes([token]))} {percent(share)}" for token, share in score.others)


def shown(content: bytes) -> str:
    """A token in quotes on one line: what is no visible character becomes an escape (\\n, \\u00a0), as does a byte that
    is a part of one (\\xc3). The end of text has no bytes."""
    if not content:
        return "end of text"
    return f'"{"".join(map(_shown, content.decode(errors="surrogateescape")))}"'


def _shown(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that surrogateescape made a character
        return f"\\x{code - 0xDC00:02x}"
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    return ascii(char)[1:-1] if code < 0x80 or code > 0xFF else f"\\u{code:04x}"


def percent(share: float | None) -> str:
    """A probability in percent; - where there is none."""
    if share is None:
        return "-"
    return "<0.01%" if 0 < share < 0.0001 else f"{100 * share:.2f}%"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _padded(text: str) -> str:
    """The text, filled up with spaces to the width of the column in a terminal."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    above = sum(unicodedata.combining(char) > 0 for char in text)
    return text + " " * (TOKEN_WIDTH - len(text) - wide + above)


def as_line(score: Score) -> str:
    """Format the score as one line of text."""
    return (
        f"{score.loss:.4f} nats per token, {score.bpb:.4f} bits per byte, "
        f"{score.tokens:,} tokens predicted, {score.text_bytes:,} bytes"
    )


def as_json(score: Score) -> dict[str, Any]:
    """Convert the score to JSON values, not rounded; null for a number that is not finite."""
    numbers = {"nats_per_token": score.loss, "bpb": score.bpb}
    finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return finite | {"tokens": score.tokens, "bytes": score.text_bytes}
