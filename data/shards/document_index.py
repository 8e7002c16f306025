"""Which document a token belongs to: a line per document, in the order of the stream: [its first token, its name].

The file grows with the corpus to gigabytes, and is asked for a few documents in the midst of training. So it is never
read as a whole: its lines are in the order of their tokens, and a search in halves finds one of them by its place.
"""

import bisect
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

BLOCK = 512  # bytes read at one time: a few lines


def names_file(folder: Path, split: str) -> Path:
    return folder / f"{split}_documents.jsonl"


def line(start: int, name: str) -> str:
    """start: where the document's first token, the end-of-text before it, stands in the stream."""
    return json.dumps([start, name]) + "\n"  # escapes the line ends of a name


def names_of(file: BinaryIO, size: int, spans: Iterable[tuple[int, int]]) -> list[str]:
    """Names of the documents that tokens start ... stop - 1 of each span belong to, in order. file: of `size` bytes.
    Raises OSError, ValueError and TypeError where it is not what was written."""
    found: dict[int, str] = {}  # by where their lines begin
    for start, stop in spans:
        # After the byte where the line wanted begins, all lines are of later tokens; up to it, this one is left.
        after = bisect.bisect_right(range(size), start, key=lambda byte: _first_token_from(file, byte))
        file.seek(after - 1)
        while (at := file.tell()) < size:
            first, name = json.loads(file.readline())
            if first >= stop:
                break
            found[at] = name
    return [found[at] for at in sorted(found)]


def _first_token_from(file: BinaryIO, byte: int) -> float:
    """Of the first document whose line begins at this byte or later."""
    if byte:
        file.seek(byte - 1)
        file.readline()  # the rest of the line before, or its end only
    else:
        file.seek(0)
    found = file.readline()
    first, _ = json.loads(found) if found else (math.inf, None)
    return first
