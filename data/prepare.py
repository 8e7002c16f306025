"""From a corpus to shards, once: later runs find them in the cache folder."""

import bisect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data.corpus import Corpus, Document
from data.durable import make_folder, sweep, whole_folder
from data.errors import UserError
from data.lock import lock
from data.sealed import digest
from data.shards import VERSION, ShardWriter, TokenStream, open_stream
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens."""

    folder: Path
    fingerprint: str  # of the corpus
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream

    def training_documents(self, spans: Iterable[tuple[int, int]]) -> list[str]:
        """Names of the documents that training tokens start ... stop - 1 of each span belong to, in order; [] where
        the list of names cannot be read, which is there for messages only."""
        try:
            starts, names = zip(*map(json.loads, _names_file(self.folder, "train").open()), strict=True)
        except (OSError, ValueError, TypeError):
            return []
        found = set()
        for start, stop in spans:
            found |= set(range(bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, stop)))
        return [names[i] for i in sorted(found)]


def prepare(corpus: Corpus, tokenizer: TokenizerConfig, cache_dir: Path) -> Prepared:
    """Opens the shards of this corpus under this tokenizer, building them first where they are not there yet.

    A build takes its place when it is whole, so that nothing half-built is ever used; a second process that wants the
    same waits for it. Raises UserError for documents that cannot be read, a cache folder that cannot be written, or
    damaged shards.
    """
    fingerprint = corpus.fingerprint()
    documents = corpus.model_dump(exclude={"document_mask"})
    identity = [VERSION, fingerprint, documents, tokenizer.name, tokenizer.model_dump()]
    key = digest({"identity": identity})[:12]
    folder = cache_dir / f"{corpus.name}-{tokenizer.name}-{key}"
    if not folder.exists():
        _build_once(corpus, fingerprint, tokenizer, folder)
    try:
        trained = load_tokenizer(folder / "tokenizer.json")
    except UserError as error:
        raise UserError(f"{error}: delete the folder {folder} and run again to rebuild it") from None
    train, val = (open_stream(folder, split, trained.hash) for split in ("train", "val"))
    return Prepared(folder, fingerprint, trained, train, val)


def _build_once(corpus: Corpus, fingerprint: str, config: TokenizerConfig, folder: Path) -> None:
    documents = {split: list(corpus.documents(split)) for split in ("train", "val")}
    for split, found in documents.items():
        if not found:
            raise UserError(f"the {split} split of data={corpus.name} is empty: more or longer text is needed")
    if corpus.fingerprint() != fingerprint:
        raise UserError(f"the documents of data={corpus.name} changed while they were read: run again")
    try:
        make_folder(folder.parent)
        busy = f"another process is preparing {folder}: waiting for it"
        guard = lock(folder.with_name(f".{folder.name}.lock"), busy, wait=True)
    except OSError as error:
        raise UserError(f"cache_dir={folder.parent} cannot be written: {error.strerror}") from None
    with guard:
        sweep(folder.parent, folder.name)
        if not folder.exists():
            try:
                _build(documents, config, folder)
            except OSError as error:
                raise UserError(f"the shards cannot be written to {folder.parent}: {error.strerror}") from None


def _build(documents: Mapping[str, list[Document]], config: TokenizerConfig, folder: Path) -> None:
    with whole_folder(folder) as building, _progress() as progress:
        megabytes = sum(len(d.text.encode()) for found in documents.values() for d in found) / 1e6
        task = progress.add_task(f"training the {config.name} tokenizer", total=None)
        tokenizer = config.train(document.text for document in documents["train"])
        tokenizer.save(building / "tokenizer.json")
        progress.update(task, description=f"encoding {megabytes:.1f} MB", total=megabytes)
        for split, found in documents.items():
            _encode(found, tokenizer, building, split, lambda done: progress.advance(task, done / 1e6))


def _encode(documents: list[Document], tokenizer: Tokenizer, folder: Path, split: str, advance) -> None:
    writer = ShardWriter(folder, split, tokenizer.dtype, tokenizer.hash)
    with _names_file(folder, split).open("w") as names:
        for document in documents:
            names.write(json.dumps([writer.total, document.name]) + "\n")
            writer.write(np.array([tokenizer.end_of_text]))
            writer.write(tokenizer.encode(document.text))
            advance(len(document.text.encode()))
    writer.close()


def _names_file(folder: Path, split: str) -> Path:
    """A line per document: where its first token, the end-of-text before it, stands, and its name."""
    return folder / f"{split}_documents.jsonl"


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
