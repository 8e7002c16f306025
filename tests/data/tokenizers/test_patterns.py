"""A long text that is cut has the tokens that it has in one piece."""

import random
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from itertools import chain, islice, product

import pytest
import tiktoken
from tokenizers import Regex, pre_tokenizers

from data.sources.python_source import StdlibCorpus
from data.tokenizers.bpe import BPEConfig, BPETokenizer
from data.tokenizers.patterns import BLANKS, CL100K, GPT2, KNOWN, O200K, PATTERN, PIECE, bounded, exact_pieces, portable
from tests.support import configured

NAMES = {PATTERN: "ours", GPT2: "gpt2", CL100K: "cl100k", O200K: "o200k"}
SOURCE = "".join(document.text for document in islice(configured(StdlibCorpus).read(), 30))[:300_000]
BYTES = [bytes([byte]) for byte in range(256)]
CHANCE = random.Random(0)


def mixed(characters: str, runs: tuple[int, ...] = (1,)) -> str:
    drawn = (CHANCE.choice(characters) * CHANCE.choice(runs) for _ in range(60_000 * len(runs) // sum(runs)))
    return "".join(drawn)


TEXTS = {
    "source": SOURCE,
    "carriage returns": SOURCE[:100_000].replace("\n", "\r\n"),
    "minified": SOURCE.replace(" ", "").replace("\n", "")[:100_000],
    "contractions": "x = (1,\n\n   ' They''re 12 345 ünï' )  \r\n" * 3000,
    "base64": b64encode(CHANCE.randbytes(60_000)).decode(),
    "Chinese": mixed("漢字仮名，。\u3000か\u3099한"),
    "Chinese lines": mixed("漢字仮名，。\n"),
    "one word": "漢" * 60_000,
    "digits": "7" * 60_000,
    "punctuation": mixed("=-*/'\n"),
    "runs": mixed(" \n\t\r/!'a1é\u0301\x1c\xa0", (1, 2, 3, 80)),
    "all characters": "".join(chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000),
}


@pytest.fixture(scope="module")
def tokens():
    return configured(BPEConfig, vocab_size=1000).train([SOURCE, *TEXTS.values()]).tokens


@pytest.fixture(scope="module", params=KNOWN, ids=NAMES.values())
def pattern(request):
    return request.param


def whole(pattern: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("whole", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def split(regex: str) -> Callable[[str], list[str]]:
    """Split a text into the words that Oniguruma finds."""
    words = pre_tokenizers.Split(Regex(regex), "isolated")
    return lambda text: [word for word, _ in words.pre_tokenize_str(text)]


def test_encode_long_text_gives_tokens_of_one_piece(pattern, tokens):
    ours, theirs = BPETokenizer(tokens, pattern, "exact"), whole(pattern, tokens)
    for name, text in TEXTS.items():
        assert len(text) > 2 * PIECE
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), name


def test_exact_pieces_natural_text_has_similar_sizes(pattern):
    for name in ("source", "carriage returns", "minified", "base64", "Chinese", "Chinese lines"):
        assert all(len(piece.text) < 1.1 * PIECE for piece in exact_pieces(TEXTS[name], pattern)), name


def test_encode_long_white_space_gives_words_of_pattern(pattern, tokens, monkeypatch):
    ours, theirs = BPETokenizer(tokens, pattern, "exact"), whole(pattern, tokens)
    monkeypatch.setattr("data.tokenizers.patterns.LONG_RUN", 200)
    words = split(portable(pattern))
    runs = (" " * 300, "\n" * 300, " \n" * 150, "\t" * 250 + "\u3000" * 250, "\r" + " " * 300)
    for before, run, after in product(("", "x", "!\n", "x\n\n "), runs, ("", "x", "\n", "\nx", " x", "/")):
        text = before + run + after
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), (before, run[:3], after)
        cut = [[piece.text] if piece.one_word else words(piece.text) for piece in exact_pieces(text, pattern)]
        assert [*chain.from_iterable(cut)] == words(text), (before, run[:3], after)


@pytest.mark.parametrize(
    "pattern", [PATTERN, *(pytest.param(one, marks=pytest.mark.slow) for one in KNOWN[1:])], ids=NAMES.values()
)
def test_encode_run_beyond_tiktoken_limit_gives_tokens(pattern):
    """A million characters: its engine keeps an entry for each, and panics."""
    spaces = [b" " * 2**i for i in range(1, 7)]
    ours = BPETokenizer([*BYTES, *spaces], pattern, "exact")
    text = "x" + " " * (64 * 2**14 + 1) + "x"
    assert ours.encode(text).tolist() == [ord("x"), *[len(BYTES) + 5] * 2**14, ord(" "), ord("x")]


def test_portable_pattern_finds_same_words_in_oniguruma(pattern):
    """tiktoken does not return words; here each word is a token."""
    text = TEXTS["runs"][:5000] + TEXTS["contractions"][:5000] + "\n  "
    words = split(portable(pattern))(text)
    vocabulary = [*BYTES, *{word.encode(): None for word in words if len(word.encode()) > 1}]
    found = whole(pattern, vocabulary).encode_ordinary(text)
    assert [vocabulary[token].decode() for token in found] == words


def test_blanks_equal_white_space_of_tiktoken():
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    found = bytes(whole(r"\s", BYTES).encode_ordinary(every)).decode()  # it leaves out what does not match
    assert set(found) == {"\r", "\n", *re.findall(f"[{BLANKS}]", every)}


def test_bounded_pattern_splits_long_words():
    words, plain = split(bounded(PATTERN, 256)), split(PATTERN)
    assert [*map(len, words("a" * 600 + "," + " " * 300))] == [256, 256, 88, 1, 256, 44]
    assert words(SOURCE[:50_000]) == plain(SOURCE[:50_000])
