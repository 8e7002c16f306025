"""Report on the text of a corpus: how much there is, what repeats, and what of it is no text.

examine(compose("data=files", "data.path=books/*.txt").data)     # compose: of training.run.config
"""

import re
from typing import NamedTuple

from data.sources.contents import Contents
from data.sources.corpus import Corpus

MAX_BYTES = 2**29  # of text that is read: ten seconds
NO_TEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd]")  # control characters, and what could not be decoded


class Report(NamedTuple):
    """Of the documents of both splits."""

    documents: int
    identical: int  # to an earlier one
    compared: bool  # all of them; else the first contents.MAX_COMPARED, and `documents` are these
    bytes: int
    characters: int
    no_text: int  # characters that NO_TEXT matches
    longest: int  # bytes of the longest document
    longest_name: str
    whole: bool  # all text; else the first MAX_BYTES
    skipped: list[str]  # rows of tables that are no documents: a line for each of what they lack


def examine(corpus: Corpus, max_bytes: int = MAX_BYTES) -> Report:
    """Read a corpus, or its first max_bytes of text, a document at a time. Raises UserError where it cannot be read;
    reading downloads, where corpus.remote says so."""
    contents = Contents()
    text_bytes = characters = no_text = length = longest = 0
    name = longest_name = ""
    whole = True
    for document in corpus.read_counting(contents.rows):
        if text_bytes >= max_bytes:
            whole = False
            break
        contents.add(document)
        size = len(document.text.encode())
        text_bytes += size
        characters += len(document.text)
        no_text += len(NO_TEXT.findall(document.text))
        length = length + size if document.name == name else size  # what is held out of a file belongs to it
        name = document.name
        longest, longest_name = max((longest, longest_name), (length, name), key=lambda each: each[0])
    documents, identical = contents.documents()
    return Report(
        documents=documents,
        identical=identical,
        compared=contents.compared_all,
        bytes=text_bytes,
        characters=characters,
        no_text=no_text,
        longest=longest,
        longest_name=longest_name,
        whole=whole,
        skipped=contents.rows.lines(),
    )
