"""Random texts round-trip through tokens; random files are read exactly, or named in a one-line error."""

from collections import defaultdict
from itertools import chain
from pathlib import Path
from random import Random

import pytest
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from common.errors import UserError
from data.sources.files import FilesCorpus
from data.sources.synthetic import SyntheticCorpus
from data.tokenizers.bpe import BPEConfig
from data.tokenizers.byte import ByteConfig
from data.tokenizers.patterns import KNOWN, PIECE, exact_pieces, portable
from data.tokenizers.vocabulary import END_OF_TEXT
from tests.support import assert_one_line, configured

FRAGMENTS = st.sampled_from([END_OF_TEXT, "<|", "\r\n", "\n", " ", "\t", "\0", "the query", "123", "é", "漢字", "🙂🏽"])
TEXTS = st.text(max_size=200) | st.lists(FRAGMENTS | st.text(max_size=5), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    texts = [document.text for document in configured(SyntheticCorpus, size=20).documents("train")]
    return [config.train(texts) for config in (configured(ByteConfig), configured(BPEConfig, vocab_size=400))]


def check_round_trip(tokenizers, text: str) -> None:
    for tokenizer in tokenizers:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode_bytes(tokens.tolist()) == text.encode()
        assert tokenizer.decode(tokens.tolist()) == text
        assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
        assert tokenizer.end_of_text not in tokens


def test_tokenizer_random_text_round_trips(fuzz, tokenizers):
    def check(text: str) -> str:
        check_round_trip(tokenizers, text)
        return "identical"

    fuzz(check, TEXTS, short=60, long=1000)


def test_exact_pieces_random_text_keeps_words(fuzz, monkeypatch):
    """With a cut in every possible place, for every pattern."""
    monkeypatch.setattr("data.tokenizers.patterns.PIECE", 1)
    monkeypatch.setattr("data.tokenizers.patterns.LONG_RUN", 3)
    splits = {pattern: pre_tokenizers.Split(Regex(portable(pattern)), "isolated") for pattern in KNOWN}

    def words(pattern: str, text: str) -> list[str]:
        return [word for word, _ in splits[pattern].pre_tokenize_str(text)]

    def check(text: str) -> str:
        for pattern in KNOWN:
            pieces = exact_pieces(text, pattern)
            cut = [[piece.text] if piece.one_word else words(pattern, piece.text) for piece in pieces]
            assert list(chain.from_iterable(cut)) == words(pattern, text)
        return "identical"

    def of_few_characters(seed: int) -> str:  # which meet in more ways than in text of many
        chance = Random(seed)
        characters = chance.sample(" \n\r\taStlé漢か。1½'/!(\u0301\u3000\x1cſʰ🙂[", chance.randint(1, 7))
        return "".join(chance.choice(characters) * chance.choice((1, 1, 1, 1, 2, 3, 5, 9)) for _ in range(30))

    fuzz(check, st.integers(0, 10**9).map(of_few_characters) | TEXTS, short=400, long=1000)


def test_tokenizer_long_run_of_one_character_round_trips(fuzz, tokenizers):
    """A regular expression or a merge loop may fail, or take forever, where nothing ends a word."""
    lengths = st.integers(0, 6).flatmap(lambda power: st.integers(1, 10**power)) | st.integers(PIECE - 2, PIECE + 2)
    runs = st.tuples(st.sampled_from(" \n\r\ta7.漢\u0301\0") | st.characters(exclude_categories=["Cs"]), lengths)

    def check(drawn: list[tuple[str, int]]) -> str:
        check_round_trip(tokenizers, "".join(character * length for character, length in drawn))
        return "identical"

    fuzz(check, st.lists(runs, min_size=1, max_size=2), short=10, long=400)


def test_encode_lone_surrogate_raises_user_error(fuzz, tokenizers):
    surrogates = st.characters(categories=["Cs"])

    def check(drawn: tuple[str, str, str]) -> str:
        for tokenizer in tokenizers:
            with pytest.raises(UserError, match=f"surrogate at character {len(drawn[0])}$") as caught:
                tokenizer.encode("".join(drawn))
            assert_one_line(caught.value)
        return "refused"

    fuzz(check, st.tuples(TEXTS, surrogates, st.text(max_size=9)), short=25, long=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


def test_files_random_bytes_are_read_exactly_or_raise_error_with_name(fuzz, folder):
    names = st.sampled_from(["a.txt", "b c.md", "d[1].py", "e::f.gz", ".g", "ünï"])
    contents = TEXTS.map(lambda text: text.encode()) | st.binary(max_size=100)
    files = st.dictionaries(names, contents, min_size=1, max_size=3)

    def check(drawn: tuple[dict[str, bytes], float]) -> str:
        written, val_fraction = drawn
        for path in folder.iterdir():
            path.unlink()
        for name, content in written.items():
            (folder / name).write_bytes(content)
        shown = {str(folder / name): content for name, content in written.items() if not name.startswith(".")}
        corpus, found = configured(FilesCorpus, path=f"{folder}/*", val_fraction=val_fraction), defaultdict(str)
        try:
            corpus.fingerprint()
            for split in ("train", "val"):
                for document in corpus.documents(split):
                    found[document.name] += document.text
        except UserError as error:
            assert_one_line(error)
            assert str(folder) in str(error)
            assert any(path in str(error) for path in shown) or not shown
            return "refused"
        assert {name: text.encode() for name, text in found.items()} == shown
        return "identical"

    fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
    fuzz(check, st.tuples(files, fractions), short=40, long=1400)
