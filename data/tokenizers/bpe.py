"""Byte-pair encoding: trained with `tokenizers`, encoded with tiktoken."""

import base64
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from common.settings import MAX_COUNT
from data.tokenizers.base import Cut, Tokenizer, TokenizerConfig, encode_utf8
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.patterns import PATTERN, PIECE, Piece, bounded, exact_pieces
from data.tokenizers.vocabulary import END_OF_TEXT, derive_merges, spelled_bytes, tokenizer_json

MAX_WORD = 256  # characters of a word in training, where time grows by the square of its length; longer ones are split
# The older rule "words" cuts at a space before a letter, most often the first of a word.
WORD = re.compile(r"(?<=\S)(?= [A-Za-z])")
LOOK_BACK = 1000  # characters searched for one

STORED_KINDS: dict[Cut, dict[str, str]] = {  # as tokenizer.json spells each rule
    "exact": {"kind": "bpe", "cut": "exact"},
    "words": {"kind": "published"},
    "line_ends": {"kind": "bpe"},
}


class BPETokenizer(Tokenizer):
    """Byte-level BPE.

    tokens: the bytes and the merged tokens, in the order in which merges apply.
    pattern: one of patterns.KNOWN, which splits text into words.
    cut: where a long text is cut before it is encoded. `exact`: where no token changes, so that every text has the
        tokens that it has in one piece. `words` and `line_ends`, the rules of older runs: after PIECE characters at the
        latest, which may change a token.
    merges: those of `tokens`, where they are known already.
    """

    def __init__(
        self, tokens: Sequence[bytes], pattern: str, cut: Cut, merges: Sequence[tuple[bytes, bytes]] | None = None
    ):
        self.tokens = tuple(tokens)
        self.pattern = pattern
        self.cut = cut
        self.known_merges = merges
        self.encoding = self._encoding(pattern)

    def encode(self, text: str) -> np.ndarray:
        encode_utf8(text)
        encoded = [self._encode_piece(piece) for piece in _cut_text(text, self.pattern, self.cut)]
        return np.concatenate([np.array(tokens, dtype=self.dtype) for tokens in encoded] or [np.array([], self.dtype)])

    def _encode_piece(self, piece: Piece) -> list[int]:
        return (self._word_encoding if piece.one_word else self.encoding).encode_ordinary(piece.text)

    @functools.cached_property
    def _word_encoding(self):
        return self._encoding(r"(?s:.+)")

    def _encoding(self, pattern: str):
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            "headroom", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    def describe(self) -> dict[str, Any]:
        return self._rules() | {"tokens": [base64.b64encode(token).decode() for token in self.tokens]}

    def content(self) -> dict[str, Any]:
        merges = derive_merges(self.tokens) if self.known_merges is None else self.known_merges
        return tokenizer_json(self.tokens, merges, self.pattern, self._rules())

    def _rules(self) -> dict[str, Any]:
        return STORED_KINDS[self.cut] | {"pattern": self.pattern}


class BPEConfig(TokenizerConfig):
    vocab_size: int = Field(ge=257, le=65536)  # a small corpus may yield fewer
    train_bytes: int = Field(ge=2**16, le=MAX_COUNT)
    cut: Literal["exact", "line_ends"]  # where long texts are cut, see BPETokenizer

    def cache_key(self) -> dict[str, Any]:
        return self.model_dump(exclude={"cut"} if self.cut == "line_ends" else None)

    @property
    def name(self) -> str:
        return f"bpe{self.vocab_size}"

    @property
    def max_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def is_trained(self) -> bool:
        return True

    def vocab_warning(self, tokenizer: Tokenizer) -> str | None:
        if tokenizer.vocab_size == self.vocab_size:
            return None
        return (
            f"tokenizer.vocab_size={self.vocab_size}: the training text yields {tokenizer.vocab_size} tokens and no "
            "more, which the run goes on with; longer text gives more"
        )

    def sample_fraction(self, total: int) -> float:
        return min(1.0, self.train_bytes / max(1, total))

    def train(self, texts: Iterable[str]) -> Tokenizer:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainee

        words = bounded(PATTERN, MAX_WORD) if self.cut == "exact" else PATTERN
        trainee = Trainee(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        sample = _take_bytes(texts, self.train_bytes)
        pieces = (piece.text for text in sample for piece in _cut_text(text, PATTERN, self.cut))
        trainee.train_from_iterator(pieces, trainer)
        merges = json.loads(trainee.to_str())["model"]["merges"]
        merged = (spelled_bytes(left + right) for left, right in merges)
        return BPETokenizer(list(dict.fromkeys([*ByteTokenizer.tokens, *merged])), PATTERN, self.cut)


def _take_bytes(texts: Iterable[str], count: int) -> Iterator[str]:
    """The first texts, until they have `count` bytes or more. Raises UserError for lone surrogates."""
    for text in texts:
        count -= len(encode_utf8(text))
        yield text
        if count <= 0:
            return


def _cut_text(text: str, pattern: str, cut: Cut) -> Iterator[Piece]:
    """Cut a long text into pieces that are encoded one by one. The places depend on the text alone."""
    return exact_pieces(text, pattern) if cut == "exact" else _older_pieces(text, between_words=cut == "words")


def _older_pieces(text: str, between_words: bool) -> Iterator[Piece]:
    """The rules of older runs: cut between words or after line ends where there are any, else anywhere."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = _older_cut(text, start, end, between_words)
        yield Piece(text[start:end])
        start = end


def _older_cut(text: str, start: int, end: int, between_words: bool) -> int:
    if between_words:
        spaces = [match.start() for match in WORD.finditer(text, end - LOOK_BACK, end)]
        if spaces:
            return spaces[-1]
    return text.rfind("\n", start, end) + 1 or end
