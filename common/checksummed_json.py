"""JSON that carries its own hash, so that a file proves it is what was written."""

import hashlib
import json
from typing import Any


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of plain JSON values, whatever the order of their keys. Raises ValueError where they are nested too
    deeply to be written."""
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def with_checksum(content: dict[str, Any]) -> str:
    """JSON that carries its own hash. Raises ValueError for a number that JSON does not have: NaN, or an infinity."""
    return json.dumps(content | {"hash": digest(content)}, indent=0, allow_nan=False)


def parse_verified(text: str) -> dict[str, Any]:
    """The content of what `with_checksum` gave. Raises ValueError where a character of it has changed."""
    content = parse_object(text)
    if "hash" not in content:
        raise ValueError("it holds no hash")
    if content.pop("hash") != digest(content):
        raise ValueError("its hash does not match its content")
    return content


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
