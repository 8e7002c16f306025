"""Lines of a dry run on the text it would train on: how much, what repeats, and what is no text."""

from collections.abc import Iterator

from common.console import counted, size
from data.report import Report, examine
from data.shards.prepare import Prepared
from data.sources.corpus import Corpus

SAMPLED_TOKENS = 2**24  # by which bytes per token are measured


def text_lines(data: Corpus, corpus: Prepared) -> Iterator[str]:
    """As far as it is known without a download. data: what was prepared as `corpus`; it is read again."""
    tokens = len(corpus.train) + len(corpus.val)
    sample = corpus.train.read(0, min(len(corpus.train), SAMPLED_TOKENS))
    per_token = corpus.tokenizer.byte_lengths[sample].mean()
    amount = f"{tokens:,} tokens of {per_token:.2f} bytes on average"
    if corpus.train.counted is not None:
        amount += f", {corpus.train.counted.read(0, len(sample)).mean():.0%} of them counted, the others of prompts"
    if data.remote or not data.has_text:
        known = f"{corpus.contents}; " if corpus.contents else ""
        yield f"text         {known}{amount}: about {size(tokens * per_token)}"
        return
    found = examine(data)
    yield f"text         {amount}: {size(found.bytes) if found.whole else f'about {size(tokens * per_token)}'}"
    yield from _quality(found)


def _quality(found: Report) -> Iterator[str]:
    where = "" if found.whole else f"of the first {size(found.bytes)}: "
    first = "" if found.compared else "the first "
    yield (
        f"documents    {where}{first}{counted(found.documents, 'document')}, {found.identical:,} of them identical to "
        f"an earlier one; the longest has {size(found.longest)}: {found.longest_name}"
    )
    for line in found.skipped:
        yield f"rows         {where}{line}: skipped"
    yield (
        f"characters   {where}{found.no_text:,} of {found.characters:,} are no text: control characters, and U+FFFD, "
        "which stands for bytes that were none"
    )
