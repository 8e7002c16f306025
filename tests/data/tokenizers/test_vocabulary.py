"""The merges in tokenizer.json give tiktoken's tokens."""

import json
from random import Random

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data.tokenizers.bpe import BPETokenizer
from data.tokenizers.patterns import PATTERN
from data.tokenizers.vocabulary import derive_merges, spelled_bytes, vocabulary_fault

BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("letters", ["a", "ab", "abcd"])
def test_derive_merges_equals_trained_merges_and_tiktoken_words(letters):
    """Text of few letters, so that several pairs give one token."""
    chance = Random(len(letters))
    words = ["".join(chance.choices(letters, k=chance.randint(1, 30))) for _ in range(300)]
    trainee = Tokenizer(models.BPE(ignore_merges=True))
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainee.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    trained = [tuple(map(spelled_bytes, pair)) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    tokens = [*BYTES, *dict.fromkeys(left + right for left, right in trained)]
    assert derive_merges(tokens) == trained
    ours = Tokenizer.from_str(json.dumps(BPETokenizer(tokens, PATTERN, "exact").content()))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("words", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    for _ in range(300):
        word = "".join(chance.choices(letters, k=chance.randint(1, 300)))
        assert ours.encode(word).ids == theirs.encode_ordinary(word)


def test_derive_merges_unreachable_token_is_found_as_word():
    tokens = [*BYTES, b"ab", b"cd", b"xyz"]
    assert derive_merges(tokens) == [(b"a", b"b"), (b"c", b"d")]
    tokenizer = BPETokenizer(tokens, PATTERN, "exact")
    theirs = Tokenizer.from_str(json.dumps(tokenizer.content()))
    for text, found in (("xyz", [258]), ("wxyz", [*b"wxyz"]), ("abcd", [256, 257])):
        assert tokenizer.encode(text).tolist() == theirs.encode(text).ids == found


def test_derive_merges_very_long_token_is_fast():
    tokens = [*BYTES, *(b"a" * 2**power for power in range(1, 17))]
    assert derive_merges(tokens) == [(b"a" * 2**power, b"a" * 2**power) for power in range(16)]


FAULTS = [
    (BYTES, None),
    (BYTES[::-1], None),
    (BYTES[1:], "it lacks 1 of the 256 bytes, such as 0x00"),
    ([], "it lacks 256 of the 256 bytes, such as 0x00"),
    ([*BYTES, b"a"], "it names a token twice"),
    ([*BYTES, b""], "it has a token without bytes"),
    ([*BYTES, b"<|endoftext|>"], "its text can spell the token <|endoftext|>"),
]


def test_vocabulary_fault_names_each_fault():
    for tokens, fault in FAULTS:
        assert vocabulary_fault(tokens) == fault
