"""From a corpus to shards, once: later runs find them in the cache folder."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data.corpus import Corpus, Document
from data.errors import UserError
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


def prepare(corpus: Corpus, tokenizer: TokenizerConfig, cache_dir: Path) -> Prepared:
    """Opens the shards of this corpus under this tokenizer, building them first where they are not there yet.

    A build happens in a temporary folder that is renamed when it is whole, so that nothing half-built is ever used.
    Raises UserError for documents that cannot be read, a cache folder that cannot be written, or damaged shards.
    """
    fingerprint = corpus.fingerprint()
    identity = [VERSION, fingerprint, corpus.model_dump(), tokenizer.name, tokenizer.model_dump()]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir / f"{corpus.name}-{tokenizer.name}-{key}"
    if not folder.exists():
        _build(corpus, tokenizer, folder)
    trained = load_tokenizer(folder / "tokenizer.json")
    train, val = (open_stream(folder, split, trained.hash) for split in ("train", "val"))
    return Prepared(folder, fingerprint, trained, train, val)


def _build(corpus: Corpus, config: TokenizerConfig, folder: Path) -> None:
    documents = {split: list(corpus.documents(split)) for split in ("train", "val")}
    for split, found in documents.items():
        if not found:
            raise UserError(f"the {split} split of data={corpus.name} is empty: more or longer text is needed")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cache_dir={folder.parent} cannot be written: {error.strerror}") from None
    try:
        with _progress() as progress:
            megabytes = sum(len(d.text.encode()) for found in documents.values() for d in found) / 1e6
            task = progress.add_task(f"training the {config.name} tokenizer", total=None)
            tokenizer = config.train(document.text for document in documents["train"])
            tokenizer.save(building / "tokenizer.json")
            progress.update(task, description=f"encoding {megabytes:.1f} MB", total=megabytes)
            for split, found in documents.items():
                _encode(found, tokenizer, building, split, lambda done: progress.advance(task, done / 1e6))
        building.chmod(0o755)
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.exists():  # if it does, another process built the same in the meantime
                raise
    except OSError as error:
        raise UserError(f"the shards cannot be written to {folder.parent}: {error.strerror}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _encode(documents: list[Document], tokenizer: Tokenizer, folder: Path, split: str, advance) -> None:
    writer = ShardWriter(folder, split, tokenizer.dtype, tokenizer.hash)
    for document in documents:
        writer.write(np.array([tokenizer.end_of_text]))
        writer.write(tokenizer.encode(document.text))
        advance(len(document.text.encode()))
    writer.close()


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
