"""Tokenizer of numbers: " 0", " 1", " 2" ... are a token each, and all other text is bytes. It needs no training."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field

from data.tokenizers.base import Tokenizer, TokenizerConfig
from data.tokenizers.bpe import BPETokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.patterns import GPT2

MAX_NUMBERS = 100_000


class NumbersConfig(TokenizerConfig):
    """Byte-level BPE whose merges are known: in GPT-2's pattern a number with the space before it is a word, each is
    another with a digit behind it, or the space."""

    size: int | None = Field(ge=1, le=MAX_NUMBERS)

    def derive(self, data: str, numbers: int | None) -> Self:
        size = numbers if self.size is None else self.size
        if size is None:
            raise ValueError(
                "tokenizer=numbers needs tokenizer.size= with text, or data that is written in numbers, as data=mqar"
            )
        if numbers is not None and size < numbers:
            raise ValueError(
                f"tokenizer.size={size} is less than the {numbers} numbers that data={data} is written in: leave it "
                "unset, or give more"
            )
        if size > MAX_NUMBERS:
            raise ValueError(f"data={data} is written in {size} numbers, tokenizer=numbers has at most {MAX_NUMBERS}")
        return self.model_copy(update={"size": size})

    @property
    def name(self) -> str:
        return f"numbers{self.size}"

    @property
    def max_vocab_size(self) -> int:
        return len(ByteTokenizer.tokens) + self.size + 1

    def train(self, texts: Iterable[str]) -> Tokenizer:
        numbers = (f" {number}".encode() for number in range(self.size))
        return BPETokenizer([*ByteTokenizer.tokens, *numbers], GPT2, "exact")
