"""Stored tokenizers: reading a run's tokenizer.json, also in the format of older runs."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from common.atomic_io import exists, read_regular
from common.checksummed_json import parse_object, parse_verified
from common.errors import UserError, reason
from data.tokenizers.base import Tokenizer, TokenizerConfig
from data.tokenizers.bpe import STORED_KINDS, BPETokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.patterns import KNOWN
from data.tokenizers.published import KIND, parse_stored, published_tokenizer
from data.tokenizers.vocabulary import OURS, parse_tokenizer_json, vocabulary_fault

MAX_JSON_BYTES = 2**26  # size limit of tokenizer.json; o200k's has a fifth of it


class StoredConfig(TokenizerConfig):
    """The tokenizer of another run, for fine-tuning from its weights."""

    path: str  # to its tokenizer.json
    hash: str  # Tokenizer.hash, so that the file is still the same one

    def derive(self, data: str, numbers: int | None) -> Self:
        """Reads nothing: a run can be looked at where the other one is gone. `check_numbers` is for its start."""
        return self

    def check_numbers(self, data: str, numbers: int) -> None:
        """Raises UserError where data that is written in numbers would not have a token for each."""
        text = "".join(f" {number}" for number in range(numbers))
        if len(self.train(()).encode(text)) != numbers:
            raise UserError(
                f"data={data} is written in {numbers} numbers, which are not a token each in {self.path}: begin with a "
                "run of tokenizer=numbers that has as many"
            )

    def cache_key(self) -> dict[str, Any]:
        return {"hash": self.hash}

    def check_available(self) -> None:
        self.train(())

    @property
    def name(self) -> str:
        return f"stored{self.hash[:8]}"

    @property
    def max_vocab_size(self) -> int:
        return self.train(()).vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        stored = load_tokenizer(Path(self.path))
        if stored.hash != self.hash:
            raise UserError(f"{self.path} is not the tokenizer it was: bring it back, or start a new run")
        return stored


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json. Raises UserError where it is missing, damaged, or cannot represent every text."""
    try:
        return _parse_tokenizer(read_regular(path, MAX_JSON_BYTES).decode(), path.parent)
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"the tokenizer {path} is damaged: {str(error)[:200]}") from None
    except KeyError as error:
        raise UserError(f"the tokenizer {path} is damaged: it lacks {str(error)[:200]}") from None
    except (TypeError, AttributeError):
        raise UserError(f"the tokenizer {path} is damaged: its parts are not what they should be") from None


def _parse_tokenizer(text: str, folder: Path) -> Tokenizer:
    """Raises ValueError, KeyError, TypeError or AttributeError where `Tokenizer.save` did not write it, now or in older
    runs, nor anybody who published a model in that folder."""
    content = parse_object(text)
    if "model" in content and OURS not in content["model"] and exists(folder / "config.json"):
        return published_tokenizer(folder, content)
    if "model" in content and content["model"].get(OURS, {}).get("kind") == KIND:
        return parse_stored(content)
    if "model" in content:
        tokens, merges, rules = parse_tokenizer_json(content)
    else:
        tokens, merges, rules = _parse_older_format(text)
    if rules == ByteTokenizer().describe() and tokens in ([], [*ByteTokenizer.tokens]):
        return ByteTokenizer()
    pattern = rules.pop("pattern")
    cut = next((cut for cut, kind in STORED_KINDS.items() if kind == rules), None)
    if cut is None or pattern not in KNOWN:
        raise ValueError("its kind or its pattern is not one that this program knows")
    fault = vocabulary_fault(tokens)
    if fault:
        raise ValueError(fault)
    return BPETokenizer(tokens, pattern, cut, merges)


def _parse_older_format(text: str) -> tuple[list[bytes], Sequence[tuple[bytes, bytes]] | None, dict[str, Any]]:
    """Tokens, merges (not stored in this format) and rules."""
    rules = parse_verified(text)
    tokens = [base64.b64decode(token, validate=True) for token in rules.pop("tokens", ())]
    return tokens, None, rules
