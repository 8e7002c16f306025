"""Byte tokenizer: each byte is a token; no training, a vocabulary of 257."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from data.tokenizers.base import Tokenizer, TokenizerConfig, encode_utf8
from data.tokenizers.vocabulary import tokenizer_json


class ByteTokenizer(Tokenizer):
    tokens = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}

    def content(self) -> dict[str, Any]:
        return tokenizer_json(self.tokens, (), None, self.describe())


class ByteConfig(TokenizerConfig):
    @property
    def name(self) -> str:
        return "byte"

    @property
    def max_vocab_size(self) -> int:
        return ByteTokenizer().vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return ByteTokenizer()
