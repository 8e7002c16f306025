"""The tokenizer of a published model: its tokenizer.json, encoded with Hugging Face's `tokenizers`."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import read_object
from data.tokenizers.base import Tokenizer, encode_utf8
from data.tokenizers.published_kinds import bytes_of_tokens, has_prefix, without_metaspace, without_prefix
from data.tokenizers.vocabulary import OURS

KIND = "huggingface"
MAX_CONFIG_BYTES = 2**24
PIECE = 2**16  # characters that are encoded at one time, and those up to the end of a line, where that is the same


class PublishedTokenizer(Tokenizer):
    """Byte-pair encoding as a tokenizer.json describes it: words, normal form and merges are its own. Special tokens
    stand for no bytes, and are not read from a text that spells them out."""

    def __init__(self, published: Mapping[str, Any], end_of_text: int):
        """published: the content of tokenizer.json. end_of_text: the token that ends a text. Raises ValueError,
        KeyError, TypeError or AttributeError where it is not of the kind that is known."""
        from tokenizers import Tokenizer as Published

        self.published = published
        self._end_of_text = end_of_text
        read = without_metaspace(published)
        tokens = bytes_of_tokens(read)
        self.has_prefix = has_prefix(read)
        if not 0 <= end_of_text < len(tokens):
            raise ValueError(f"its end of text, {end_of_text}, is none of its {len(tokens):,} tokens")
        tokens[end_of_text] = b""
        self.tokens = tuple(tokens)
        # Without a division into words a text takes a hundred times its memory, and no merge goes over a line end.
        has_lines = any(b"\n" in token and len(token) > 1 for token in tokens)
        self.by_lines = read.get("pre_tokenizer") is None and not has_lines
        try:
            self.encoding = Published.from_str(json.dumps(read))
            self.continuing = Published.from_str(json.dumps(without_prefix(read)))
        except Exception as error:  # of the library, which has no class for it
            raise ValueError(f"tokenizers cannot read it: {error}") from None
        for token in published.get("added_tokens") or ():
            if self.encoding.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"its added token {token['content']!r} has another number than {token['id']}")
        self.encoding.no_truncation()
        self.encoding.no_padding()
        self.encoding.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def end_of_text(self) -> int:
        return self._end_of_text

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([*map(len, self.tokens)])

    def encode(self, text: str) -> np.ndarray:
        return self._encode(text, self.encoding)

    def encode_continuation(self, text: str) -> np.ndarray:
        return self._encode(text, self.continuing)

    def _encode(self, text: str, encoding) -> np.ndarray:
        encode_utf8(text)
        found = []
        for piece in _pieces(text) if self.by_lines else [text]:
            found.append(np.array(encoding.encode(piece, add_special_tokens=False).ids, dtype=self.dtype))
            encoding = self.continuing
        return np.concatenate(found)

    def decode(self, tokens: Iterable[int]) -> str:
        """Decode the tokens of a whole text, without the space that was put before it."""
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.has_prefix else text

    def plain(self) -> Tokenizer:
        return PublishedTokenizer({**self.published, "post_processor": None}, self._end_of_text)

    def describe(self) -> dict[str, Any]:
        return {"kind": KIND, "end_of_text": self._end_of_text, "tokenizer": self.published}

    def content(self) -> dict[str, Any]:
        rules = {"kind": KIND, "end_of_text": self._end_of_text, "hash": self.hash}
        return {**self.published, "model": {**self.published["model"], OURS: rules}}


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while end := text.find("\n", start + PIECE) + 1:
        yield text[start:end]
        start = end
    yield text[start:]


def parse_stored(content: dict[str, Any]) -> PublishedTokenizer:
    """The tokenizer whose `content` that is. Raises ValueError, KeyError, TypeError or AttributeError where it is
    something else, or any of it has changed."""
    model = dict(content["model"])
    rules = model.pop(OURS)
    found = PublishedTokenizer({**content, "model": model}, rules["end_of_text"])
    if found.hash != rules["hash"]:
        raise ValueError("its hash does not match its content")
    return found


def published_tokenizer(folder: Path, content: Mapping[str, Any]) -> PublishedTokenizer:
    """The tokenizer beside the config.json of a published model. content: of its tokenizer.json. Raises UserError where
    nothing says which token ends a text, and ValueError and the like as PublishedTokenizer does."""
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    stated: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        stated.append(_read(folder / name).get("eos_token_id"))
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    stated.insert(0, added.get(token["content"] if isinstance(token, Mapping) else token))
    first = next(
        (each[0] if isinstance(each, list) and each else each for each in stated if each not in (None, [])), None
    )
    if type(first) is not int:
        raise UserError(
            f"{folder} does not say which token ends a text: state eos_token_id in {folder / 'config.json'}"
        )
    return PublishedTokenizer(content, first)


def _read(path: Path) -> dict[str, Any]:
    """An object of a JSON file; none of one that is not there. Raises UserError."""
    try:
        return read_object(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return {}
