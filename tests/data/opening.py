"""Open tokenizer.json with Hugging Face's libraries."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers

from data.tokenizers.base import Tokenizer
from data.tokenizers.vocabulary import END_OF_TEXT


def assert_opened(path: Path, ours: Tokenizer, texts: Iterable[str]) -> None:
    """`tokenizers` and `transformers` open the file and find the tokens of ours, and the texts in them; and the end of
    a text where it is spelled out, which to ours is text like any other."""
    theirs = tokenizers.Tokenizer.from_file(str(path))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in texts:
        tokens = ours.encode(text).tolist()
        assert theirs.encode(text).ids == tokens
        assert fast(text)["input_ids"] == tokens
        assert theirs.decode(tokens, skip_special_tokens=False) == fast.decode(tokens) == text
    spelled = f"a{END_OF_TEXT}b"
    a, b = ours.encode("a").tolist(), ours.encode("b").tolist()
    assert theirs.get_vocab_size() == len(fast) == ours.vocab_size
    assert theirs.encode(spelled).ids == fast(spelled)["input_ids"] == [*a, ours.end_of_text, *b]
    theirs.encode_special_tokens = True
    as_text = ours.encode(spelled).tolist()
    assert theirs.encode(spelled).ids == fast(spelled, split_special_tokens=True)["input_ids"] == as_text
