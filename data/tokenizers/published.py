"""The tokenizer of a published model: its tokenizer.json, encoded with Hugging Face's `tokenizers`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import read_object
from data.tokenizers.base import Tokenizer, encode_utf8
from data.tokenizers.vocabulary import OURS, spelled_bytes

KIND = "huggingface"
MAX_CONFIG_BYTES = 2**24


class PublishedTokenizer(Tokenizer):
    """Byte-level BPE as a tokenizer.json describes it: words, normal form and merges are its own. Special tokens stand
    for no bytes, and are not read from a text that spells them out."""

    def __init__(self, published: Mapping[str, Any], end_of_text: int):
        """published: the content of tokenizer.json. end_of_text: the token that ends a text. Raises ValueError,
        KeyError, TypeError or AttributeError where it is not of the kind that is known."""
        from tokenizers import Tokenizer as Published

        self.published = published
        self._end_of_text = end_of_text
        tokens = _bytes_of_tokens(published)
        if not 0 <= end_of_text < len(tokens):
            raise ValueError(f"its end of text, {end_of_text}, is none of its {len(tokens):,} tokens")
        tokens[end_of_text] = b""
        self.tokens = tuple(tokens)
        try:
            self.encoding = Published.from_str(json.dumps(published))
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
        encode_utf8(text)
        return np.array(self.encoding.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        return {"kind": KIND, "end_of_text": self._end_of_text, "tokenizer": self.published}

    def content(self) -> dict[str, Any]:
        rules = {"kind": KIND, "end_of_text": self._end_of_text, "hash": self.hash}
        return {**self.published, "model": {**self.published["model"], OURS: rules}}


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


def _bytes_of_tokens(published: Mapping[str, Any]) -> list[bytes]:
    """What each token stands for, by number; a number that is no token, for nothing."""
    _check_kind(published)
    added = {token["id"]: token for token in published.get("added_tokens") or ()}
    vocab = {number: token for token, number in published["model"]["vocab"].items()}
    count = max([*vocab, *added], default=-1) + 1
    if count > 4 * (len(vocab) + len(added)):
        raise ValueError("its tokens are numbered with gaps")
    found = [spelled_bytes(vocab[i]) if i in vocab and i not in added else b"" for i in range(count)]
    for number, token in added.items():
        found[number] = b"" if token["special"] else token["content"].encode()
    missing = {bytes([byte]) for byte in range(256)}.difference(found)
    if missing:
        raise ValueError(f"it lacks {len(missing)} of the 256 bytes, such as 0x{min(missing).hex()}")
    return found


def _check_kind(published: Mapping[str, Any]) -> None:
    """Raise ValueError where it is not byte-level BPE that gives every text its tokens, and one text the same ones."""
    model = published["model"]
    words = [one for one in _each(published.get("pre_tokenizer"), "pretokenizers") if one["type"] == "ByteLevel"]
    decodes = [one for one in _each(published.get("decoder"), "decoders") if one["type"] == "ByteLevel"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not words or not decodes:
        raise ValueError("byte-level BPE alone is known, as of GPT-2, Llama 3, Qwen and DeepSeek")
    changes = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    changes += ["add_prefix_space"] if any(one.get("add_prefix_space") for one in words) else []
    forms = [one["type"] for one in _each(published.get("normalizer"), "normalizers")]
    changes += [f"normalizer {form}" for form in forms if form != "NFC"]
    stripping = [token for token in published.get("added_tokens") or () if token.get("lstrip") or token.get("rstrip")]
    changes += ["added tokens that strip spaces"] if any(not token["special"] for token in stripping) else []
    if changes:
        raise ValueError(f"its {', '.join(changes)} would change a text, and only NFC may")


def _each(part: Mapping[str, Any] | None, of_sequence: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the one that there is."""
    return [] if part is None else list(part[of_sequence]) if part["type"] == "Sequence" else [part]
