"""Which published tokenizers are known, and the bytes that each of their tokens stands for.

Two kinds of byte-pair encoding spell every text:

- byte-level, whose tokens are bytes, spelled in letters of their own: GPT-2, Llama 3, Qwen, DeepSeek;
- with bytes as the fallback, whose tokens are characters, ▁ a space, and <0x00> ... <0xFF> the bytes of characters
  that are no token: Llama 2, Mistral. Before a text they put a space, which decoding takes away again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.tokenizers.vocabulary import spelled_bytes

SPACE = "▁"
SPELL_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREFIX = {"type": "Prepend", "prepend": SPACE}
READ_SPACES = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
DECODER = [READ_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP_PREFIX = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def bytes_of_tokens(published: Mapping[str, Any]) -> list[bytes]:
    """What each token of a tokenizer.json stands for, by number; a number that is no token, for nothing. Raises
    ValueError, KeyError, TypeError or AttributeError where it is not of a kind that is known."""
    spelled = _spelling(published)
    added = {token["id"]: token for token in published.get("added_tokens") or ()}
    vocab = {number: token for token, number in published["model"]["vocab"].items()}
    count = max([*vocab, *added], default=-1) + 1
    if count > 4 * (len(vocab) + len(added)):
        raise ValueError("its tokens are numbered with gaps")
    found = [spelled(vocab[i]) if i in vocab and i not in added else b"" for i in range(count)]
    for number, token in added.items():
        found[number] = b"" if token["special"] else token["content"].encode()
    missing = {bytes([byte]) for byte in range(256)}.difference(found)
    if missing:
        raise ValueError(f"it lacks {len(missing)} of the 256 bytes, such as 0x{min(missing).hex()}")
    return found


def without_metaspace(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """With normalizers in place of a Metaspace that splits nothing: they give the same tokens, but also to a text that
    begins with a space, which Metaspace would lose."""
    found = published.get("pre_tokenizer") or {}
    scheme = found.get("prepend_scheme")
    usual = {"type": "Metaspace", "replacement": SPACE, "split": False, "prepend_scheme": scheme}
    if found != usual or published.get("normalizer") is not None:
        return published
    parts = [SPELL_SPACES] if scheme == "never" else [PREFIX, SPELL_SPACES]
    return {**published, "pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": parts}}


def has_prefix(published: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, which is none of its own."""
    return PREFIX in _each(published.get("normalizer"), "normalizers")


def without_prefix(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """As it encodes what goes on from another text."""
    if not has_prefix(published):
        return published
    others = [one for one in _each(published["normalizer"], "normalizers") if one != PREFIX]
    return {**published, "normalizer": {"type": "Sequence", "normalizers": others}}


def _spelling(published: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How its tokens spell bytes. Raises ValueError where it does not give every text its tokens, and one text the same
    ones."""
    fallback = published["model"]["type"] == "BPE" and bool(published["model"].get("byte_fallback"))
    changes = _changes_of_fallback(published) if fallback else _changes_of_byte_level(published)
    model = published["model"]
    changes += [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if changes:
        raise ValueError(f"its {', '.join(changes)} would change a text")
    return _with_fallback if fallback else spelled_bytes


def _changes_of_byte_level(published: Mapping[str, Any]) -> list[str]:
    """What would change a text, other than to its NFC form. Raises ValueError where it is of no kind that is known."""
    words = [one for one in _each(published.get("pre_tokenizer"), "pretokenizers") if one["type"] == "ByteLevel"]
    decodes = [one for one in _each(published.get("decoder"), "decoders") if one["type"] == "ByteLevel"]
    if published["model"]["type"] != "BPE" or not words or not decodes:
        raise ValueError(
            "byte-level BPE is known, as of GPT-2, Llama 3, Qwen and DeepSeek, and BPE with bytes as the fallback, as "
            "of Llama 2 and Mistral"
        )
    changes = ["add_prefix_space"] if any(one.get("add_prefix_space") for one in words) else []
    forms = [one["type"] for one in _each(published.get("normalizer"), "normalizers")]
    changes += [f"normalizer {form}" for form in forms if form != "NFC"]
    stripping = [token for token in published.get("added_tokens") or () if token.get("lstrip") or token.get("rstrip")]
    return changes + (["added tokens that strip spaces"] if any(not token["special"] for token in stripping) else [])


def _changes_of_fallback(published: Mapping[str, Any]) -> list[str]:
    """What would change a text, other than ▁ to a space."""
    parts = _each(published.get("normalizer"), "normalizers")
    fit = parts in ([SPELL_SPACES], [PREFIX, SPELL_SPACES])
    changes = [] if fit else [f"normalizer {_types(parts)}"]
    words = _each(published.get("pre_tokenizer"), "pretokenizers")
    changes += [f"pre_tokenizer {_types(words)}"] if words else []
    decodes = _each(published.get("decoder"), "decoders")
    fit = decodes == ([*DECODER, STRIP_PREFIX] if has_prefix(published) else DECODER)
    changes += [] if fit else [f"decoder of {_types(decodes)}"]
    plain = [token for token in published.get("added_tokens") or () if not token["special"]]
    changes += ["added tokens that are not special"] if plain else []  # each text between two would have a prefix
    spelled_out = published["model"].get("ignore_merges")  # <0x41> in a text would be an A
    return changes + (["ignore_merges"] if spelled_out else [])


def _with_fallback(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()


def _each(part: Mapping[str, Any] | None, of_sequence: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the one that there is."""
    return [] if part is None else list(part[of_sequence]) if part["type"] == "Sequence" else [part]


def _types(parts: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(part["type"]) for part in parts) or "nothing"
