"""Shards of a corpus that is tokens already: copied, after a look at each token."""

import logging
import time
from pathlib import Path

import numpy as np

from common.atomic_io import atomic_folder
from common.console import counted
from common.errors import UserError
from data.shards.build import SPLITS, contents_path
from data.shards.document_index import index_entry, index_path
from data.shards.token_files import ShardWriter
from data.sources.corpus import Split
from data.sources.tokens import TokenBlock, TokensCorpus
from data.tokenizers.base import Tokenizer, TokenizerConfig

log = logging.getLogger("headroom")


def copy_tokens(corpus: TokensCorpus, fingerprint: str, config: TokenizerConfig, folder: Path) -> None:
    """Build `folder`, as `build` does; the index names files in the place of documents. Raises UserError for tokens
    that the tokenizer does not have, and OSError; nothing stays then."""
    tokenizer = config.train(())
    log.info(f"copying the tokens of {counted(len(corpus.sources()), 'file')}, as those of tokenizer={config.name}")
    start = time.monotonic()
    with atomic_folder(folder) as building:
        tokenizer.save(building / "tokenizer.json")
        copied = [_copy_split(corpus, split, tokenizer, config.name, building) for split in SPLITS]
        tokens, ends = map(sum, zip(*copied, strict=True))
        if corpus.fingerprint() != fingerprint:
            raise UserError(f"the files of data={corpus.name} changed while they were read: run again")
        contents = f"{counted(len(corpus.sources()), 'file')}, {counted(ends, 'end of text', 'ends of text')}"
        contents_path(building).write_text(contents)
    log.info(f"copied {tokens:,} tokens in {time.monotonic() - start:.1f} s: {folder}")


def _copy_split(corpus: TokensCorpus, split: Split, tokenizer: Tokenizer, name: str, building: Path) -> tuple[int, int]:
    """-> the number of tokens, and of those that end a text."""
    writer = ShardWriter(building, split, tokenizer.dtype, tokenizer.hash)
    ends = 0
    with index_path(building, split).open("w") as index:
        path = None
        for block in corpus.tokens(split, tokenizer.end_of_text):
            _check_known(block, tokenizer, name)
            if block.path != path:
                path = block.path
                index.write(index_entry(writer.total, path))
            writer.write(block.tokens)
            ends += int((block.tokens == tokenizer.end_of_text).sum())
    writer.close()
    return writer.total, ends


def _check_known(block: TokenBlock, tokenizer: Tokenizer, name: str) -> None:
    unknown = np.flatnonzero(block.tokens >= tokenizer.vocab_size)
    if len(unknown):
        raise UserError(
            f"{block.path} holds token {block.tokens[unknown[0]]} (its number {block.place + int(unknown[0]) + 1:,}), "
            f"tokenizer={name} has {tokenizer.vocab_size:,} from 0: name the tokenizer that made the file, or exclude "
            "the file"
        )
