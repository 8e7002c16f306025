"""Text to tokens and back: bytes, or byte-pair encoding. Every text comes back exactly."""

import base64
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from common.atomic_io import read_regular, write_atomic
from common.checksummed_json import digest, parse_object, parse_verified
from common.errors import UserError, reason
from common.settings import FrozenSettings
from data.tokenizers.patterns import KNOWN, PATTERN, PIECE, Piece, bounded, pieces
from data.tokenizers.vocabulary import END_OF_TEXT, fault_of, merges_of, read, spelled_bytes, written

LONGEST_WORD = 256  # characters of a word that training takes as one: its time grows by their square
MOST_BYTES = 2**26  # of a tokenizer.json; o200k's takes a fifth of it
# Of the older rule "words": a space that most often begins a word.
WORD = re.compile(r"(?<=\S)(?= [A-Za-z])")
LOOK_BACK = 1000  # characters searched for one


Cut = Literal["exact", "words", "line_ends"]


class Tokenizer(ABC):
    """Tokens 0..V-2 stand for byte strings; the last one ends a text and stands for none."""

    tokens: Sequence[bytes]  # all but the last token
    cut: Cut | None = None  # where a long text is cut before it is encoded; None where that changes no token anyway

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_of_text(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> type:
        """The smallest type that holds a token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: bytes of text each token stands for."""
        return np.array([*map(len, self.tokens), 0])

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """(n,) of `dtype`. Special tokens never come out of plain text. Raises UserError for lone surrogates."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The end of a text decodes to nothing."""
        return b"".join(self.tokens[token] for token in tokens if token != self.end_of_text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode(errors="replace")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What makes this tokenizer what it is, as plain JSON values."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Of tokenizer.json, which `load_tokenizer` and Hugging Face's libraries read."""

    @functools.cached_property
    def hash(self) -> str:
        return digest(self.describe())

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(self.content(), indent=0).encode())


class ByteTokenizer(Tokenizer):
    tokens = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}

    def content(self) -> dict[str, Any]:
        return written(self.tokens, (), None, self.describe())


KINDS: dict[Cut, dict[str, str]] = {  # as tokenizer.json says it
    "exact": {"kind": "bpe", "cut": "exact"},
    "words": {"kind": "published"},
    "line_ends": {"kind": "bpe"},
}


class BPETokenizer(Tokenizer):
    """tokens: the bytes and the merged tokens, in the order in which merges apply. pattern: one of KNOWN, which splits
    text into words. cut: where a long text is cut before it is encoded. `exact`: where no token changes, so that every
    text has the tokens that it has in one piece. `words` and `line_ends`, of older runs: after PIECE characters at the
    latest, which may change a token."""

    def __init__(
        self, tokens: Sequence[bytes], pattern: str, cut: Cut, merges: Sequence[tuple[bytes, bytes]] | None = None
    ):
        self.tokens, self.pattern, self.cut = tuple(tokens), pattern, cut
        self.known_merges = merges  # of these tokens, where they have been worked out before
        self.encoding = self._encoding(pattern)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        found = [self._encode(piece) for piece in _pieces(text, self.pattern, self.cut)]
        return np.concatenate([np.array(tokens, dtype=self.dtype) for tokens in found] or [np.array([], self.dtype)])

    def _encode(self, piece: Piece) -> list[int]:
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
        merges = merges_of(self.tokens) if self.known_merges is None else self.known_merges
        return written(self.tokens, merges, self.pattern, self._rules())

    def _rules(self) -> dict[str, Any]:
        return KINDS[self.cut] | {"pattern": self.pattern}


class TokenizerConfig(FrozenSettings, ABC):
    @property
    @abstractmethod
    def name(self) -> str:
        """A short word for folders."""

    @abstractmethod
    def train(self, texts: Iterable[str]) -> Tokenizer:
        """The same texts in the same order give the same tokenizer. Reads of them what it needs."""

    @property
    @abstractmethod
    def max_vocab_size(self) -> int:
        """The size of the vocabulary, known before there is one; of one that text decides, the most it can have. Raises
        UserError where a file that says it cannot be read."""

    def share(self, total: int) -> float:
        """How much of so many bytes of training text `train` wants to read, spread over all of it."""
        return 1.0

    def refuse_missing(self) -> None:
        """Raises UserError where a file that `train` reads is not there, or is not the right one."""

    def cache_key(self) -> dict[str, Any]:
        """The settings that the tokens depend on, which are part of the name that prepared shards have: what older
        runs did has no key here."""
        return self.model_dump()

    def vocab_warning(self, tokenizer: Tokenizer) -> str | None:
        """What a tokenizer that this made lacks of what was asked for, in words for the user, if anything."""
        return None


class ByteConfig(TokenizerConfig):
    @property
    def name(self) -> str:
        return "byte"

    @property
    def max_vocab_size(self) -> int:
        return ByteTokenizer().vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return ByteTokenizer()


class BPEConfig(TokenizerConfig):
    vocab_size: int = Field(4096, ge=257, le=65536)  # a small corpus may yield fewer
    train_bytes: int = Field(100_000_000, ge=2**16)
    cut: Literal["exact", "line_ends"] = "exact"  # where long texts are cut, see BPETokenizer

    def cache_key(self) -> dict[str, Any]:
        return self.model_dump(exclude={"cut"} if self.cut == "line_ends" else None)

    @property
    def name(self) -> str:
        return f"bpe{self.vocab_size}"

    @property
    def max_vocab_size(self) -> int:
        return self.vocab_size

    def vocab_warning(self, tokenizer: Tokenizer) -> str | None:
        if tokenizer.vocab_size == self.vocab_size:
            return None
        return (
            f"tokenizer.vocab_size={self.vocab_size}: the training text yields {tokenizer.vocab_size} tokens and no "
            "more, which the run goes on with; longer text gives more"
        )

    def share(self, total: int) -> float:
        return min(1.0, self.train_bytes / max(1, total))

    def train(self, texts: Iterable[str]) -> Tokenizer:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainee

        words = bounded(PATTERN, LONGEST_WORD) if self.cut == "exact" else PATTERN
        trainee = Trainee(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        sample = _first(texts, self.train_bytes)
        pieces_of = functools.partial(_pieces, pattern=PATTERN, cut=self.cut)
        trainee.train_from_iterator((piece.text for text in sample for piece in pieces_of(text)), trainer)
        merges = json.loads(trainee.to_str())["model"]["merges"]
        merged = (spelled_bytes(left + right) for left, right in merges)
        return BPETokenizer(list(dict.fromkeys([*ByteTokenizer.tokens, *merged])), PATTERN, self.cut)


class StoredConfig(TokenizerConfig):
    """The tokenizer of a run, for another that goes on from its weights."""

    path: str  # of its tokenizer.json
    hash: str  # of what it holds

    def cache_key(self) -> dict[str, Any]:
        return {"hash": self.hash}

    def refuse_missing(self) -> None:
        self.train(())

    @property
    def name(self) -> str:
        return f"stored{self.hash[:8]}"

    @property
    def max_vocab_size(self) -> int:
        return self.train(()).vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        stored = load_tokenizer(Path(self.path))
        if stored.hash != self.hash:
            raise UserError(f"{self.path} is not the tokenizer it was: bring it back, or start a new run")
        return stored


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises UserError where the file is missing, damaged, or not a tokenizer that gives every text back."""
    try:
        return _tokenizer_of(read_regular(path, MOST_BYTES).decode())
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"the tokenizer {path} is damaged: {str(error)[:200]}") from None
    except KeyError as error:
        raise UserError(f"the tokenizer {path} is damaged: it lacks {str(error)[:200]}") from None
    except (TypeError, AttributeError):
        raise UserError(f"the tokenizer {path} is damaged: its parts are not what they should be") from None


def _tokenizer_of(text: str) -> Tokenizer:
    """Raises ValueError, KeyError, TypeError or AttributeError where it is not what `Tokenizer.save` wrote, now or in
    older runs."""
    content = parse_object(text)
    if "model" in content:
        tokens, merges, rules = read(content)
    else:
        rules, merges = parse_verified(text), None
        tokens = [base64.b64decode(token, validate=True) for token in rules.pop("tokens", ())]
    if rules == ByteTokenizer().describe() and tokens in ([], [*ByteTokenizer.tokens]):
        return ByteTokenizer()
    pattern = rules.pop("pattern")
    cut = next((cut for cut, kind in KINDS.items() if kind == rules), None)
    if cut is None or pattern not in KNOWN:
        raise ValueError("its kind or its pattern is not one that this program knows")
    fault = fault_of(tokens)
    if fault:
        raise ValueError(fault)
    return BPETokenizer(tokens, pattern, cut, merges)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None


def _first(texts: Iterable[str], most: int) -> Iterator[str]:
    """The texts, up to and with the one that makes `most` bytes. Raises UserError for lone surrogates."""
    for text in texts:
        most -= len(_utf8(text))
        yield text
        if most <= 0:
            return


def _pieces(text: str, pattern: str, cut: Cut) -> Iterator[Piece]:
    """Of a long text; where it is cut depends on the text alone."""
    return pieces(text, pattern) if cut == "exact" else _older_pieces(text, between_words=cut == "words")


def _older_pieces(text: str, between_words: bool) -> Iterator[Piece]:
    """As older runs cut it: between words or after line ends where there are any, else anywhere."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            found = [match.start() for match in WORD.finditer(text, end - LOOK_BACK, end)] if between_words else []
            end = found[-1] if found else text.rfind("\n", start, end) + 1 or end
        yield Piece(text[start:end])
        start = end
