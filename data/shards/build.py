"""Build shards part by part: no corpus has to fit into memory, and a killed build loses one part at most.

A part is the documents that begin within PART_BYTES of text. Several threads encode it into a shard of each split, in
an atomic folder of its own. When all parts exist, their shards together are the build. Which tokens stand where depends
on the documents and the tokenizer alone, not on the threads or on kills.
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
from data.shards.document_index import index_entry, index_path
from data.shards.token_files import Shard, ShardWriter, counted_name, shard_paths
from data.sources import bounds
from data.sources.contents import Contents
from data.sources.corpus import Corpus, Document, Split, hash_sample
from data.tokenizers.base import Tokenizer, TokenizerConfig
from data.tokenizers.load import load_tokenizer
from data.tokenizers.patterns import last_cut

SPLITS: tuple[Split, Split] = ("train", "val")
PART_BYTES = 2**28  # text in one part, which has one shard per split: a kill costs at most this much
BATCH_BYTES = 2**18  # of text that a thread encodes at one time
PASSAGE = 2**12  # characters in one sample of a long corpus for training the tokenizer
MAX_IDLE_DAYS = 14  # after which parts of an unfinished build are removed
WORKERS = min(16, os.cpu_count() or 1)
log = logging.getLogger("headroom")


class Size(NamedTuple):
    """Bytes of text; None where they are not known before all is read."""

    train: int | None
    val: int | None

    @property
    def megabytes(self) -> float | None:
        return None if self.train is None else (self.train + self.val) / 1e6


class Encoded(NamedTuple):
    """A document's tokens, (n,) each."""

    prompt: np.ndarray
    text: np.ndarray  # that follows the prompt


def measure(corpus: Corpus, window: int = 1) -> Size:
    """Read the corpus once, unless that is a download, so that a fault of its last document is reported before the
    first is encoded. Logs what the corpus contains. Raises UserError for a fault, for a split without documents, and
    for one with too few bytes for a window of so many tokens."""
    if corpus.remote:
        return Size(None, None)
    found = Contents()
    for _ in found.documents_of(corpus):
        pass
    _check_no_split_empty(corpus, found)
    for split in SPLITS:  # a token is a byte or more, but the one that begins a document
        if found.bytes[split] + found.begun[split] < window:
            raise too_short(split, f"{found.bytes[split]:,} bytes", window)
    _log_contents(corpus, found)
    return Size(found.bytes["train"], found.bytes["val"])


def build(
    corpus: Corpus, fingerprint: str, config: TokenizerConfig, folder: Path, size: Size, workers: int = WORKERS
) -> None:
    """Build `folder`; the caller holds its lock. Raises UserError for documents that cannot be read, and OSError:
    finished parts stay then, and the next call continues after them."""
    parts = _parts_folder(folder)
    start = time.monotonic()
    make_folder(parts)
    remove_unfinished(parts)
    try:
        contents = _make_parts(corpus, config, parts, size, workers)
        if corpus.fingerprint() != fingerprint:
            discard_parts(folder)
            raise UserError(f"the documents of data={corpus.name} changed while they were read: run again")
        with atomic_folder(folder) as building:
            _assemble(parts, building)
            contents_path(building).write_text(contents.summary(len(corpus.sources())))
    except BaseException:
        with suppress(OSError):  # unknown whether any is finished: keep them
            if not _finished_parts(parts):
                discard_parts(folder)
        raise
    if corpus.remote:
        _log_contents(corpus, contents)
    megabytes = sum(contents.bytes.values()) / 1e6
    seconds = time.monotonic() - start
    log.info(f"prepared {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s): {folder}")


def _make_parts(corpus: Corpus, config: TokenizerConfig, parts: Path, size: Size, workers: int) -> Contents:
    """Train the tokenizer and encode the corpus, with a progress bar."""
    with _progress() as progress:
        task = progress.add_task(f"training the {config.name} tokenizer", total=None)
        tokenizer = _tokenizer(corpus, config, parts, size)
        finished = len(_finished_parts(parts))
        description = f"encoding (after {finished} finished parts)" if finished else "encoding"
        progress.reset(task, description=description, total=size.megabytes)
        return _encode(corpus, tokenizer, parts, workers, lambda done: progress.advance(task, done / 1e6))


def contents_path(folder: Path) -> Path:
    """The file with `Contents.summary`."""
    return folder / "contents.txt"


def has_parts(folder: Path) -> bool:
    """Whether finished parts of a build are kept, after which the next one continues."""
    try:
        return bool(_finished_parts(_parts_folder(folder)))
    except OSError:
        return False


def discard_parts(folder: Path) -> None:
    """Remove the parts of a build that is done, or cannot use them; leaves what cannot be removed."""
    with suppress(OSError):
        for parts in _parts_folders(folder.parent):
            if _build_name(parts) == folder.name:
                remove(parts)


def discard_abandoned(cache_dir: Path) -> None:
    """Remove parts of any build that ended midway and was not continued for MAX_IDLE_DAYS."""
    try:
        parts_folders = _parts_folders(cache_dir)
    except OSError:  # they cannot be listed: keep them
        return
    for parts in parts_folders:
        with suppress(OSError, UserError):  # gone in between, not ours to remove, or being built right now
            days = (time.time() - parts.stat().st_mtime) / 86400  # the folder changes with every part that ends
            if days > MAX_IDLE_DAYS:
                name = _build_name(parts)
                with lock(lock_file(cache_dir / name), "in use"):
                    remove_unfinished(cache_dir, name)
                    shutil.rmtree(parts)
                log.info(f"removed {parts}: parts of a build that ended midway and was left for {days:.0f} days")


def lock_file(folder: Path) -> Path:
    """The lock file of the process that builds `folder`."""
    return folder.with_name(f".{folder.name}.lock")


def _parts_folder(folder: Path) -> Path:
    return folder.with_name(f".parts-{PART_BYTES}-{folder.name}")  # parts of another size do not fit these


def _build_name(parts: Path) -> str:
    """The name of the folder that these parts become."""
    return parts.name.split("-", 2)[-1]


def _parts_folders(cache_dir: Path) -> list[Path]:
    """The parts folders of all builds; the name is checked because the cache folder may contain other things."""
    return [cache_dir / name for name in names_in(cache_dir) if re.match(r"\.parts-\d+-.", name)]


def _finished_parts(parts: Path) -> list[Path]:
    return [parts / name for name in names_in(parts) if name.startswith("part_")]


def _tokenizer(corpus: Corpus, config: TokenizerConfig, parts: Path, size: Size) -> Tokenizer:
    """The tokenizer that finished parts were encoded with, or a newly trained one."""
    saved = parts / "tokenizer.json"
    if exists(saved):
        return load_tokenizer(saved)
    fraction = 1.0 if size.train is None else config.sample_fraction(size.train)
    texts = (document.text for document in corpus.documents("train"))
    tokenizer = config.train(texts if fraction == 1 else _sample(texts, fraction))
    tokenizer.save(saved)
    return tokenizer


def _sample(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """Sample passages evenly from the text, whether it comes in many documents or in one."""
    passages = (text[i : i + PASSAGE] for text in texts for i in range(0, len(text), PASSAGE))
    return (passage for i, passage in enumerate(passages) if hash_sample(i, fraction, "tokenizer"))


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, parts: Path, workers: int, advance: Callable[[int], None]
) -> Contents:
    """Encode the corpus into the parts that do not exist yet -> the contents of the whole corpus."""
    totals = dict.fromkeys(SPLITS, 0)  # tokens of each split so far
    contents = Contents()
    read = contents.documents_of(corpus)
    documents = _EndOfIteration(_cut_between_words(read) if tokenizer.cut == "exact" else read)
    for number, numbered in itertools.groupby(_numbered(documents, PART_BYTES), key=lambda pair: pair[0]):
        folder = parts / f"part_{number:05d}"
        part = (document for _, document in numbered)
        if exists(folder):
            for document in part:
                advance(_bytes(document))
            totals = {split: _last_shard(folder, split).header["end"] for split in SPLITS}
            continue
        with atomic_folder(folder) as building:
            after = {split: (number, totals[split]) for split in SPLITS}
            writers = _writers(building, tokenizer, after, corpus.has_prompts)
            _write_part(building, writers, _encoded(part, tokenizer, workers), tokenizer.end_of_text, advance)
            for writer in writers.values():
                writer.close(last=documents.ended)
            totals = {split: writers[split].total for split in SPLITS}
    _check_no_split_empty(corpus, contents)
    return contents


def _writers(
    building: Path, tokenizer: Tokenizer, after: dict[Split, tuple[int, int]], has_prompts: bool
) -> dict[str, ShardWriter]:
    """Of the shards of each split, by their names. after: as ShardWriter takes it."""
    kinds = {split: (split, tokenizer.dtype) for split in SPLITS}
    if has_prompts:
        kinds |= {counted_name(split): (split, np.uint8) for split in SPLITS}
    return {
        name: ShardWriter(building, name, dtype, tokenizer.hash, 2**62, after[split])
        for name, (split, dtype) in kinds.items()
    }


def _write_part(
    building: Path,
    writers: dict[str, ShardWriter],
    encoded: Iterable[tuple[Document, Encoded]],
    end_of_text: int,
    advance: Callable[[int], None],
) -> None:
    with index_path(building, "train").open("w") as train, index_path(building, "val").open("w") as val:
        indices = {"train": train, "val": val}
        for document, (prompt, text) in encoded:
            writer = writers[document.split]
            end_before = np.array([] if document.is_continuation else [end_of_text], text.dtype)
            if not document.is_continuation:
                indices[document.split].write(index_entry(writer.total, document.name))
            for tokens in (end_before, prompt, text):
                writer.write(tokens)
            counted = writers.get(counted_name(document.split))
            if counted is not None:  # the end before it too, which follows from the text before
                for tokens, counts in ((end_before, 1), (prompt, 0), (text, 1)):
                    counted.write(np.full(len(tokens), counts))
            advance(_bytes(document))


def _cut_between_words(documents: Iterable[Document]) -> Iterator[Document]:
    """Move the cuts of long documents to where no token changes. A part without such a place is joined to the next."""
    before = None
    for document in documents:
        if before and document.is_continuation:
            cut = last_cut(before.text)
            if not cut and len(before.text) > bounds.MAX_LENGTH:
                raise bounds.length_error(f"{before.name}, in a passage where no word ends,")
            rest = before.text[cut:] + document.text
            document = document._replace(text=rest) if cut else before._replace(text=rest)
            before = before._replace(text=before.text[:cut]) if cut else None
        if before:
            yield before
        before = document
    if before:
        yield before


class _EndOfIteration:
    """An iterable of documents that knows whether the last one has been taken."""

    def __init__(self, documents: Iterator[Document]):
        self.documents = documents
        self.ended = False

    def __iter__(self) -> Iterator[Document]:
        yield from self.documents
        self.ended = True


def _numbered(documents: Iterable[Document], part_bytes: int) -> Iterator[tuple[int, Document]]:
    """(number of its part, document): a part is full when it has `part_bytes`."""
    number = 0
    filled = 0
    for document in documents:
        if filled >= part_bytes:
            number += 1
            filled = 0
        filled += _bytes(document)
        yield number, document


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Document, Encoded]]:
    """Documents and their tokens, in order. In threads, not processes: tiktoken releases Python's lock while it
    encodes."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(_encode_batch, tokenizer, batch)))
            if len(waiting) > 2 * workers:
                batch, tokens = waiting.popleft()
                yield from zip(batch, tokens.result(), strict=True)
        for batch, tokens in waiting:
            yield from zip(batch, tokens.result(), strict=True)


def _encode_batch(tokenizer: Tokenizer, batch: list[Document]) -> list[Encoded]:
    return [_encode_document(tokenizer, document) for document in batch]


def _encode_document(tokenizer: Tokenizer, document: Document) -> Encoded:
    """Encode the prompt by itself, as it is given to a model to be continued."""
    prompt, text = document.text[: document.prompt], document.text[document.prompt :]
    goes_on = document.prompt or document.is_continuation
    return Encoded(tokenizer.encode(prompt), (tokenizer.encode_continuation if goes_on else tokenizer.encode)(text))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += _bytes(document)
        if filled >= BATCH_BYTES:
            yield batch
            batch = []
            filled = 0
    if batch:
        yield batch


def _last_shard(folder: Path, split: Split) -> Shard:
    return Shard(shard_paths(folder, split)[-1])


def _assemble(parts: Path, building: Path) -> None:
    """Hard-link the shards of all parts, so that no token is copied, and concatenate their indices."""
    shutil.copyfile(parts / "tokenizer.json", building / "tokenizer.json")
    for folder in _finished_parts(parts):
        for split in SPLITS:
            for path in shard_paths(folder, split) + shard_paths(folder, counted_name(split)):
                try:
                    os.link(path, building / path.name)
                except OSError:  # a file system without links, or without space, which copying reports
                    shutil.copyfile(path, building / path.name)
            with index_path(building, split).open("ab") as whole, index_path(folder, split).open("rb") as part:
                shutil.copyfileobj(part, whole)


def _log_contents(corpus: Corpus, contents: Contents) -> None:
    log.info(f"data={corpus.name}: {contents.summary(len(corpus.sources()))}")
    contents.warn_of_markers()


def _check_no_split_empty(corpus: Corpus, contents: Contents) -> None:
    if not contents.bytes and contents.rows.lines():
        lacking = "; ".join(contents.rows.lines())
        raise UserError(f"data={corpus.name} has no documents, as {lacking}: name other columns, or give other files")
    for split in SPLITS:
        if split not in contents.bytes:
            found = f", of {contents.documents_summary(len(corpus.sources()))}" * bool(contents.bytes)
            lacking = "".join(f". {line}" for line in contents.rows.lines())
            raise UserError(
                f"the {split} split of data={corpus.name} is empty{found}: more or longer text is needed{lacking}"
            )


def too_short(split: Split, held: str, window: int) -> UserError:
    """The error of a split that fills no window of so many tokens. held: what it holds instead."""
    return UserError(
        f"the {'training' if split == 'train' else 'validation'} split holds {held}, one window of "
        f"model.context_length={window - 1} takes {window} tokens: give more text, or a shorter context"
    )


def _bytes(document: Document) -> int:
    return len(document.text.encode())


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.1f} MB, {task.finished_speed or task.speed or 0:.1f} MB/s")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Speed(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
