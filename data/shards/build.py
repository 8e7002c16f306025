"""Shards in the making: in parts, so that no corpus has to fit into memory and a killed build loses one part at most.

A part is the documents that begin in so many bytes of text. Several threads encode it into a shard of each split, in a
folder of its own that stands whole or not at all. When all are there, their shards are what the build is. Which tokens
stand where depends on the documents and the tokenizer alone, not on the threads or on kills.
"""

import itertools
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from common.atomic_io import atomic_folder, exists, make_folder, names_in, remove, remove_unfinished
from common.errors import UserError
from common.lock import lock
from data.shards.document_index import line, names_file
from data.shards.token_files import Shard, ShardWriter, shard_paths
from data.sources.contents import Contents
from data.sources.corpus import Corpus, Document, Split, hash_sample
from data.tokenizers.patterns import last_cut
from data.tokenizers.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

SPLITS: tuple[Split, Split] = ("train", "val")
PART_BYTES = 2**28  # of text: what a kill costs at most, and a shard per split
BATCH_BYTES = 2**18  # of text that a thread encodes at one time
PASSAGE = 2**12  # characters that a tokenizer is trained on together, where it does not read all
DAYS = 14  # that parts wait for somebody to continue them
WORKERS = min(16, os.cpu_count() or 1)
log = logging.getLogger("headroom")


class Size(NamedTuple):
    """Bytes of text; None where they are not known before all is read."""

    train: int | None
    val: int | None


def measure(corpus: Corpus) -> Size:
    """Reads all there is once, where that costs no download: what is wrong with the last document is said before the
    first is encoded, and what there is in a line. Raises UserError for what is wrong, and for a split without
    documents."""
    if corpus.remote:
        return Size(None, None)
    found = Contents()
    for document in corpus.read():
        found.add(document)
    _refuse_empty(corpus, found)
    _say(corpus, found)
    return Size(found.bytes["train"], found.bytes["val"])


def build(
    corpus: Corpus, fingerprint: str, config: TokenizerConfig, folder: Path, size: Size, workers: int = WORKERS
) -> None:
    """Makes `folder`. Call it under a lock. Raises UserError for documents that cannot be read, and OSError; finished
    parts are kept then, and the next call goes on after them."""
    parts, began = _parts_of(folder), time.monotonic()
    make_folder(parts)
    remove_unfinished(parts)
    total = None if size.train is None else (size.train + size.val) / 1e6
    try:
        with _progress() as progress:
            task = progress.add_task(f"training the {config.name} tokenizer", total=None)
            tokenizer = _tokenizer(corpus, config, parts, size)
            kept = len(_finished(parts))
            progress.reset(task, description="encoding" + f" (after {kept} finished parts)" * bool(kept), total=total)
            contents = _encode(corpus, tokenizer, parts, workers, lambda done: progress.advance(task, done / 1e6))
        if corpus.fingerprint() != fingerprint:
            discard_parts(folder)
            raise UserError(f"the documents of data={corpus.name} changed while they were read: run again")
        with atomic_folder(folder) as building:
            _assemble(parts, building)
            contents_file(building).write_text(contents.described(len(corpus.sources())))
    except BaseException:
        with suppress(OSError):  # unknown: then they are kept
            if not _finished(parts):
                discard_parts(folder)
        raise
    if corpus.remote:
        _say(corpus, contents)
    megabytes, seconds = sum(contents.bytes.values()) / 1e6, time.monotonic() - began
    log.info(f"prepared {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s): {folder}")


def contents_file(folder: Path) -> Path:
    """A line that says what the documents are."""
    return folder / "contents.txt"


def discard_parts(folder: Path) -> None:
    """Of a build that is done, or has no use for them; what cannot be removed is left."""
    with suppress(OSError):
        for parts in _all_parts(folder.parent):
            if parts.name.split("-", 2)[-1] == folder.name:
                remove(parts)


def discard_abandoned(cache_dir: Path) -> None:
    """Parts of builds that ended midway and were not continued for DAYS, whichever documents they are of."""
    try:
        all_parts = _all_parts(cache_dir)
    except OSError:  # then whether they are abandoned cannot be told
        return
    for parts in all_parts:
        name = parts.name.split("-", 2)[-1]
        with suppress(OSError, UserError):  # gone in between, not ours to remove, or being built right now
            age = (time.time() - parts.stat().st_mtime) / 86400  # the folder changes with every part that ends
            if age > DAYS:
                with lock(lock_file(cache_dir / name), "in use"):
                    remove_unfinished(cache_dir, name)
                    shutil.rmtree(parts)
                log.info(f"removed {parts}: parts of a build that ended midway and was left for {age:.0f} days")


def lock_file(folder: Path) -> Path:
    """Of whoever builds `folder`."""
    return folder.with_name(f".{folder.name}.lock")


def _parts_of(folder: Path) -> Path:
    return folder.with_name(f".parts-{PART_BYTES}-{folder.name}")  # parts of another size do not fit these


def _all_parts(cache_dir: Path) -> list[Path]:
    """As `_parts_of` names them: the cache may lie in a folder with other things in it."""
    return [cache_dir / name for name in names_in(cache_dir) if re.match(r"\.parts-\d+-.", name)]


def _finished(parts: Path) -> list[Path]:
    return [parts / name for name in names_in(parts) if name.startswith("part_")]


def _tokenizer(corpus: Corpus, config: TokenizerConfig, parts: Path, size: Size) -> Tokenizer:
    """The one that the parts there are encoded with, or a new one."""
    saved = parts / "tokenizer.json"
    if exists(saved):
        return load_tokenizer(saved)
    share = 1.0 if size.train is None else config.share(size.train)
    texts = (document.text for document in corpus.documents("train"))
    tokenizer = config.train(texts if share == 1 else _sample(texts, share))
    tokenizer.save(saved)
    return tokenizer


def _sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """Passages from all over the text, whether it comes in many documents or in one."""
    passages = (text[i : i + PASSAGE] for text in texts for i in range(0, len(text), PASSAGE))
    return (passage for i, passage in enumerate(passages) if hash_sample(i, share, "tokenizer"))


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, parts: Path, workers: int, advance: Callable[[int], None]
) -> Contents:
    """Makes the parts that are not there yet -> what all of them are of."""
    totals, contents = dict.fromkeys(SPLITS, 0), Contents()
    read = contents.counting(corpus.read())
    documents = _Ending(_cut_between_words(read) if tokenizer.cut == "exact" else read)
    for number, part in itertools.groupby(_numbered(documents, PART_BYTES), key=lambda pair: pair[0]):
        folder = parts / f"part_{number:05d}"
        if exists(folder):
            for _, document in part:
                advance(_bytes(document))
            totals = {split: _last_shard(folder, split).header["end"] for split in SPLITS}
            continue
        with atomic_folder(folder) as building:
            kind = (tokenizer.dtype, tokenizer.hash, 2**62, number)
            writers = {split: ShardWriter(building, split, *kind, totals[split]) for split in SPLITS}
            with names_file(building, "train").open("w") as train, names_file(building, "val").open("w") as val:
                for document, tokens in _encoded((document for _, document in part), tokenizer, workers):
                    writer = writers[document.split]
                    if not document.is_continuation:
                        names = val if document.held_out else train
                        names.write(line(writer.total, document.name))
                        writer.write(np.array([tokenizer.end_of_text]))
                    writer.write(tokens)
                    advance(_bytes(document))
            for split, writer in writers.items():
                writer.close(last=documents.ended)
                totals[split] = writer.total
    _refuse_empty(corpus, contents)
    return contents


def _cut_between_words(documents: Iterable[Document]) -> Iterator[Document]:
    """The parts of long documents, cut where no token changes. A part without such a place is one with the next."""
    before = None
    for document in documents:
        if before and document.is_continuation:
            cut = last_cut(before.text)
            rest = before.text[cut:] + document.text
            document = document._replace(text=rest) if cut else before._replace(text=rest)
            before = before._replace(text=before.text[:cut]) if cut else None
        if before:
            yield before
        before = document
    if before:
        yield before


class _Ending:
    """Documents, and whether the last of them has been taken."""

    def __init__(self, documents: Iterator[Document]):
        self.documents, self.ended = documents, False

    def __iter__(self) -> Iterator[Document]:
        yield from self.documents
        self.ended = True


def _numbered(documents: Iterable[Document], most: int) -> Iterator[tuple[int, Document]]:
    """Each with the number of its part: a part is full when it has `most` bytes."""
    number, filled = 0, 0
    for document in documents:
        if filled >= most:
            number, filled = number + 1, 0
        filled += _bytes(document)
        yield number, document


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents and their tokens, in order. Threads do: tiktoken leaves Python's lock to others while it encodes."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(_encode_batch, tokenizer, batch)))
            if len(waiting) > 2 * workers:
                batch, tokens = waiting.popleft()
                yield from zip(batch, tokens.result(), strict=True)
        for batch, tokens in waiting:
            yield from zip(batch, tokens.result(), strict=True)


def _encode_batch(tokenizer: Tokenizer, batch: list[Document]) -> list[np.ndarray]:
    return [tokenizer.encode(document.text) for document in batch]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, filled = [], 0
    for document in documents:
        batch.append(document)
        filled += _bytes(document)
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _last_shard(folder: Path, split: Split) -> Shard:
    return Shard(shard_paths(folder, split)[-1])


def _assemble(parts: Path, building: Path) -> None:
    """The shards of all parts, as links: they stay where they are on the disk."""
    shutil.copyfile(parts / "tokenizer.json", building / "tokenizer.json")
    for folder in _finished(parts):
        for split in SPLITS:
            for path in shard_paths(folder, split):
                try:
                    os.link(path, building / path.name)
                except OSError:  # a file system without links, or without space, which copying says
                    shutil.copyfile(path, building / path.name)
            with names_file(building, split).open("ab") as names, names_file(folder, split).open("rb") as part:
                shutil.copyfileobj(part, names)


def _say(corpus: Corpus, contents: Contents) -> None:
    log.info(f"data={corpus.name}: {contents.described(len(corpus.sources()))}")
    contents.warn_of_markers()


def _refuse_empty(corpus: Corpus, contents: Contents) -> None:
    for split in SPLITS:
        if split not in contents.bytes:
            found = f", of {contents.described(len(corpus.sources()))}" * bool(contents.bytes)
            raise UserError(f"the {split} split of data={corpus.name} is empty{found}: more or longer text is needed")


def _bytes(document: Document) -> int:
    return len(document.text.encode())


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.1f} MB, {task.finished_speed or task.speed or 0:.1f} MB/s")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Speed(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
