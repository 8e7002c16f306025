"""A text as a page in HTML, colored by how surprising each token was to a model.

python sample.py --score FILE --html page.html
"""

import codecs
import html
import math
import statistics
from pathlib import Path

from common.atomic_io import write_atomic
from common.errors import UserError, escaped, reason
from data.tokenizers.base import Tokenizer
from generation.score_lines import others, percent, shown
from generation.scoring import TokenScore

STEP = 0.5  # nats from one color to the next
# Equal steps in OKLab (Ottosson 2020) from white to an orange: lightness alone tells them apart, for every eye, and
# black text has a contrast of 5.9 or more on each.
COLORS = (
    "#ffffff", "#fff5f2", "#ffece4", "#ffe2d7", "#ffd8c9", "#fecebc", "#fdc4af", "#fcbaa1", "#fbb094",
    "#f9a687", "#f79c79", "#f5926b", "#f3875d", "#f07c4e", "#ee713d", "#eb652a", "#e8590c",
)  # fmt: skip
STYLE = """
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: white; color: black; font: 15px sans-serif; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; }
main { font: 15px/1.7 monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
main span:hover { outline: 2px solid black; }
.given { border-bottom: 2px dotted gray; }
.ends::before { content: "\\21b5"; color: gray; }
.scale { display: inline-flex; vertical-align: middle; border: 1px solid gray; margin: 0 0.4em; }
.scale span { width: 1.2em; height: 1em; }
"""
# Should markup ever get past the escapes, it could load and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class ScorePage:
    """The page of a text, whose tokens are added as they are scored. Tokens that end no character are shown with the
    next one that does, in the color of their mean."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.waiting: list[TokenScore] = []
        self.spans: list[str] = []

    def add(self, scores: list[TokenScore]) -> None:
        """Add the next tokens of the text."""
        for score in scores:
            self.waiting.append(score)
            text = self.decoder.decode(self.tokenizer.decode_bytes([score.token]))
            if text:
                self.spans.append(self._span(text))
                self.waiting = []

    def write(self, path: Path, name: str, summary: str) -> None:
        """Write the page, or replace it, atomically. name: of the text and the model; summary: the score in one line.
        Raises UserError."""
        try:
            write_atomic(path, self._page(name, summary).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {reason(error)}") from None

    def _span(self, text: str) -> str:
        nats = [score.nats for score in self.waiting if score.rank is not None]
        classes = f"c{_color(statistics.fmean(nats))}" if nats else "given"
        classes += " ends" if text.startswith("\n") else ""
        words = "\n".join(map(self._words, self.waiting))
        return f'<span class="{classes}" title="{html.escape(words)}">{_text(text)}</span>'

    def _words(self, score: TokenScore) -> str:
        """What is shown where the mouse rests on a token."""
        name = shown(self.tokenizer.decode_bytes([score.token]))
        if score.rank is None:
            return f"{name}: given, not predicted"
        rank = f"rank {score.rank:,} of {self.tokenizer.vocab_size:,}"
        words = f"{name}: {score.nats:.4f} nats, probability {percent(score.probability)}, {rank}"
        return f"{words}\nothers: {others(score, self.tokenizer)}" if score.others else words

    def _page(self, name: str, summary: str) -> str:
        colors = "".join(f".c{i} {{ background: {color}; }}\n" for i, color in enumerate(COLORS))
        return f"""<!DOCTYPE html>
<html lang="und">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}</title>
<style>{STYLE}{colors}</style>
</head>
<body>
<h1>{_text(name)}</h1>
<p>{_text(summary)}</p>
{_legend()}
<main>{"".join(self.spans)}</main>
</body>
</html>
"""


def _color(nats: float) -> int:
    return min(int(nats / STEP), len(COLORS) - 1)


def _legend() -> str:
    most = STEP * (len(COLORS) - 1)
    scale = "".join(f'<span class="c{i}" title="from {STEP * i:g} nats"></span>' for i in range(len(COLORS)))
    return (
        f'<p>0 nats, certain <span class="scale">{scale}</span> {most:g} nats or more, probability below '
        f"{percent(math.exp(-most))}. Rest the mouse on a token to see its own. "
        '<span class="given">Dotted</span>: given, not predicted.</p>'
    )


def _text(text: str) -> str:
    """Text as HTML. Control characters, which could also reorder the text, are escapes; line ends and tabs stay."""
    return html.escape(escaped(text, keep="\n\t"))
