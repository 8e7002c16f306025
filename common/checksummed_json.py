"""JSON with a checksum, so that damage to a file is found when it is read."""

import hashlib
import json
from typing import Any


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of JSON values, independent of the order of their keys. Raises ValueError where their nesting is too deep
    to encode."""
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def with_checksum(content: dict[str, Any]) -> str:
    """Encode as JSON, with its own hash as the key `hash`. Raises ValueError for NaN and infinity, which JSON lacks."""
    return json.dumps(content | {"hash": digest(content)}, indent=0, allow_nan=False)


def parse_verified(text: str) -> dict[str, Any]:
    """Decode the text that `with_checksum` made. Raises ValueError where a character of it has changed."""
    content = parse_object(text)
    if "hash" not in content:
        raise ValueError("it holds no hash")
    if content.pop("hash") != digest(content):
        raise ValueError("its hash does not match its content")
    return content


def parse_object(text: str) -> dict[str, Any]:
    """Decode a JSON object. Raises ValueError for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
