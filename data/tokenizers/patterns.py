"""The patterns that split text into words before byte-pair encoding, and the places where a text may be cut so that its
pieces have, word for word, the words of the whole.

Every character is matched by an alternative of each pattern, so no text is lost. Here a blank is
white space other than \\r and \\n.

A cut at p changes no word if no word of the whole text reaches across p, and if every word before p is found the same
way where the text ends at p. Words after p stay because no pattern looks behind. Both hold for each of the KNOWN
patterns in these three places:

- Between a character that is no white space and a space or tab. In every alternative a blank is the first character or
  follows white space only, so nothing that has read the character before p can read the one after it, whether it is
  there or not. The lookahead and the $ are tried after white space only, so not at p.
- Between one of LETTERS (Latin, kana, Han, Hangul) and one of MARKS (digits and punctuation, without the apostrophe).
  After a letter, alternatives go on with letters, with combining marks or with a contraction's apostrophe, and none of
  these is among MARKS.
- After a line feed that stands between characters that are no white space, of which the second is no slash. Punctuation
  before it takes the line feed and goes on with \\r, \\n or / only. Otherwise the run of white space is this one
  character, which is a word of its own with or without the text after it. (After several, GPT-2's pattern makes two
  words of what is one word at the end of a text.)

Where a text has none of these for long, its piece is longer. tiktoken's engine reads any length of one, but for this:
`\\s+(?!\\S)` keeps an entry for each character of a run, and fails at a million. It is tried on runs of blanks only, as
`\\s*[\\r\\n]` has taken all up to the last line end; GPT-2's pattern has no such alternative, so there on whole runs of
white space. What it finds there is known without the engine: all of the run but the last character if another one
follows, all of it at the end of the text. (Where the pattern has `\\s++$`, this takes the run at the end of a text, and
does not fail.) So a long run becomes a piece that is one word. A cut at its start changes no word either: before it
stands no white space, or else a line end, and a word goes on from a line end into blanks only up to another line end or
by `\\s++$`. Nor does one at its end, where that word ends.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

# Words with the character before them, numbers of up to three digits, punctuation with the line's end, white space.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_BEGIN = r"[^\r\n\p{L}\p{N}]?"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    f"{_BEGIN}{_UPPER}*{_LOWER}+{_END}|{_BEGIN}{_UPPER}+{_LOWER}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = (PATTERN, GPT2, CL100K, O200K)

PIECE = 25_000  # characters after which a cut is looked for
LONG_RUN = 100_000  # characters of white space: the engine fails at ten times as many
# Python's white space includes four control characters that the patterns do not count: that only leaves out some cuts.
LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
MARKS = r"!-&(-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
CUT = re.compile(rf"(?<=\S)(?=[ \t])|(?<=[{LETTERS}])(?=[{MARKS}])|(?<=\S\n)(?=[^\s/])")
BLANKS = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's, without \r and \n


class Piece(NamedTuple):
    text: str
    one_word: bool = False  # the pattern is not to split it


def exact_pieces(text: str, pattern: str) -> Iterator[Piece]:
    """Cut a text into pieces of about PIECE characters, longer where it has no exact cut, that together have the words
    that `pattern`, one of KNOWN, finds in the whole text."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE)
        end = cut.start() if cut else len(text)
        yield from _around_long_runs(text[start:end], pattern)
        start = end


def last_cut(text: str) -> int:
    """The last exact cut of a text: no word changes there, whatever follows. 0 where there is none."""
    last = 0
    for width in (1000, len(text)):  # most often a cut is near the end
        for cut in CUT.finditer(text, max(0, len(text) - width)):
            last = cut.start()
        if last:
            break
    return last


def _around_long_runs(text: str, pattern: str) -> Iterator[Piece]:
    start = 0
    if len(text) > LONG_RUN:
        for begin, end in _long_words(text, pattern):
            if begin > start:
                yield Piece(text[start:begin])
            yield Piece(text[begin:end], one_word=True)
            start = end
    if start < len(text):
        yield Piece(text[start:])


def _long_words(text: str, pattern: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of words of LONG_RUN characters and more that `\\s+(?!\\S)` would find."""
    blanks = BLANKS if r"[\r\n]" in pattern else BLANKS + r"\r\n"
    for run in re.finditer(f"[{blanks}]+", text):
        begin, end = run.span()
        if end - begin > LONG_RUN:
            if end == len(text):
                if r"\s++$" not in pattern:
                    yield begin, end
            elif text[end] not in "\r\n":
                yield begin, end - 1


def portable(pattern: str) -> str:
    """A pattern that finds the same words in Oniguruma, the engine of `tokenizers`: there {1,3}+ is no possessive
    quantifier and $ matches at each line's end. In the KNOWN patterns no possessive quantifier changes what matches:
    what follows one never matches a character that it could give back."""
    return re.sub(r"(?<=[+*?])\+|(?<=\d\})\+", "", pattern).replace("$", r"\z")


def bounded(pattern: str, max_word: int) -> str:
    """A pattern that finds the same words, except that it splits runs of more than `max_word` characters of one kind.
    `pattern` has no possessive quantifiers."""
    return re.sub(r"(?<=[\]}s])[+*]", lambda found: f"{{{int(found[0] == '+')},{max_word}}}", pattern)
