"""tokenizer.json: a vocabulary of byte strings, in the format of Hugging Face's `tokenizers` and `transformers`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from common.checksummed_json import digest
from data.tokenizers.patterns import portable

END_OF_TEXT = "<|endoftext|>"  # precedes each document; spelled out in a text it is text like any other
OURS = "headroom"  # the key, in `model`, of our own values: at the top level `tokenizers` refuses unknown keys
MAX_WORK = 2**29  # sum of squared token lengths; the time to derive merges is proportional to it


def vocabulary_fault(tokens: Sequence[bytes]) -> str | None:
    """Return why these tokens cannot spell every text, each in one way; None where they can."""
    missing = {bytes([byte]) for byte in range(256)}.difference(tokens)
    if missing:
        return f"it lacks {len(missing)} of the 256 bytes, such as 0x{min(missing).hex()}"
    if len(set(tokens)) < len(tokens):
        return "it names a token twice"
    if b"" in tokens:
        return "it has a token without bytes"
    if sum(len(token) ** 2 for token in tokens) > MAX_WORK:
        return f"its tokens are too long, such as one of {max(map(len, tokens)):,} bytes"
    if END_OF_TEXT.encode() in tokens:
        return f"its text can spell the token {END_OF_TEXT}"
    return None


def tokenizer_json(
    tokens: Sequence[bytes], merges: Iterable[tuple[bytes, bytes]], pattern: str | None, rules: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the content of tokenizer.json.

    pattern: splits text into words; None does not split.
    rules: JSON values, which `parse_tokenizer_json` gives back.
    """
    split = {"type": "Split", "pattern": {"Regex": portable(pattern or "")}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
        "vocab": {_spell(token): rank for rank, token in enumerate(tokens)},
        "merges": [[_spell(left), _spell(right)] for left, right in merges],
        OURS: dict(rules),
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(tokens), "content": END_OF_TEXT, **added}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level] if pattern else [byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    model[OURS]["hash"] = digest(content)
    return content


def parse_tokenizer_json(content: dict[str, Any]) -> tuple[list[bytes], list[tuple[bytes, bytes]], dict[str, Any]]:
    """The tokens, merges and rules in the content that `tokenizer_json` built. Raises ValueError, KeyError, TypeError
    or AttributeError where it is something else, or any of it has changed."""
    if OURS not in content["model"]:
        raise ValueError("Headroom did not write it")
    rules = content["model"][OURS]
    if rules.pop("hash") != digest(content):
        raise ValueError("its hash does not match its content")
    vocab = content["model"]["vocab"]
    merges = content["model"]["merges"]
    if not all(type(rank) is int for rank in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its tokens are not numbered from 0 without a gap")
    if not all(left in vocab and right in vocab and left + right in vocab for left, right in merges):
        raise ValueError("it merges tokens that it does not have")
    tokens = [spelled_bytes(token) for token in sorted(vocab, key=vocab.__getitem__)]
    return tokens, [(spelled_bytes(left), spelled_bytes(right)) for left, right in merges], rules


def derive_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Derive the merges that make `tokenizers` give the tokens that tiktoken finds by ranks alone, in order.

    tiktoken merges any two neighbours that together are a token, the lowest rank first. A token's bytes are merged by
    the tokens before it in the same way wherever they stand, unless a merge reaches across their ends: so they have
    come down to the same two parts whenever the token's turn comes, those of its bytes alone. A token that its
    predecessors leave in more parts (none that was trained) is found as a whole word; it gets every pair that makes it.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = _split_by_ranks(token, ranks, rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            else:
                halves = ((token[:i], token[i:]) for i in range(1, len(token)))
                merges += [(left, right) for left, right in halves if left in ranks and right in ranks]
    return merges


def _split_by_ranks(token: bytes, ranks: Mapping[bytes, int], end: int) -> list[bytes]:
    """The parts of a token after all merges of ranks below `end`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, end) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= end:
            break
        merged = []
        i = 0
        while i < len(parts):
            width = 2 if i < len(pair_ranks) and pair_ranks[i] == lowest else 1
            merged.append(b"".join(parts[i : i + width]))
            i += width
        parts = merged
    return parts


def _visible_bytes() -> list[str]:
    """The characters by which byte-level BPE (Radford et al. 2019) spells bytes 0 ... 255: printable Latin-1 stands for
    itself, the others for 256, 257, ... in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_SPELLING = _visible_bytes()
_BYTE = {character: byte for byte, character in enumerate(_SPELLING)}


def _spell(token: bytes) -> str:
    return token.decode("latin-1").translate(_SPELLING)


def spelled_bytes(token: str) -> bytes:
    """Convert byte-level BPE characters to bytes. Raises ValueError for a character that spells no byte."""
    try:
        return bytes([_BYTE[character] for character in token])
    except KeyError as error:
        raise ValueError(f"no byte is spelled {error}") from None
