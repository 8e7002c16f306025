"""Stop strings: find them in text that arrives in pieces."""

from collections.abc import Sequence


def find_stop_string(text: str, stops: Sequence[str]) -> int | None:
    """Find the first stop string to be complete -> its index in the text; of several that end at the same character,
    the longest. None where there is none."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return None
    end, negative_length = min(found)
    return end + negative_length


def split_partial_stop(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """Split a text without stop strings in two; the second part is its longest suffix that a stop string starts with,
    which later text may complete."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:]
    return text, ""
