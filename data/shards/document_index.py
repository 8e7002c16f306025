"""An index from tokens to documents: a line per document, in the order of the stream: [its first token, its name].

The file grows with the corpus to gigabytes, and is asked for a few documents during training. So it is never read as a
whole: its lines are in the order of their tokens, and a binary search over its bytes finds one of them.
"""

import bisect
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 512  # at one time: a few lines


def index_path(folder: Path, split: str) -> Path:
    return folder / f"{split}_documents.jsonl"


def index_entry(start: int, name: str) -> str:
    """start: the index in the stream of the document's first token, the end-of-text token before it."""
    return json.dumps([start, name]) + "\n"  # escapes the line ends of a name


def document_names(file: BinaryIO, size: int, spans: Iterable[tuple[int, int]]) -> list[str]:
    """Names of the documents that tokens start ... stop - 1 of each span belong to, in order. size: of the file, in
    bytes. Raises OSError, ValueError and TypeError where the file is damaged."""
    found: dict[int, str] = {}  # by the byte where their line begins
    for start, stop in spans:
        # The first byte after which only lines of later tokens begin: the line wanted begins one byte before it.
        after = bisect.bisect_right(range(size), start, key=lambda byte: _first_token_from(file, byte))
        file.seek(after - 1)
        while (at := file.tell()) < size:
            first, name = json.loads(file.readline())
            if first >= stop:
                break
            found[at] = name
    return [found[at] for at in sorted(found)]


def _first_token_from(file: BinaryIO, byte: int) -> float:
    """The first token of the first document whose line begins at this byte or later; infinite where there is none."""
    if byte:
        file.seek(byte - 1)
        file.readline()  # the rest of the previous line, or only its end
    else:
        file.seek(0)
    line = file.readline()
    first, _ = json.loads(line) if line else (math.inf, None)
    return first
