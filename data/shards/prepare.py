"""Prepare a corpus: tokens in shards, built once and found by later runs in the cache folder."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.atomic_io import exists, make_folder, names_in, open_regular, read_regular, remove_unfinished
from common.checksummed_json import digest
from common.errors import NotFetched, UserError, reason
from common.lock import lock
from common.paths import raise_unreadable
from data.shards.build import build, contents_path, discard_abandoned, discard_parts, has_parts, lock_file, measure
from data.shards.copy_tokens import copy_tokens
from data.shards.document_index import READ_BYTES, document_names, index_path
from data.shards.token_files import VERSION, TokenStream, open_stream
from data.sources.corpus import Corpus
from data.tokenizers.base import Tokenizer, TokenizerConfig
from data.tokenizers.load import load_tokenizer

MAX_CONTENTS_BYTES = 2**16  # it is a line
log = logging.getLogger("headroom")


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens."""

    folder: Path
    fingerprint: str  # Corpus.fingerprint()
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream

    @property
    def contents(self) -> str | None:
        """`Contents.summary`, a line. None where it cannot be read, as for shards of versions that did not write it."""
        try:
            return read_regular(contents_path(self.folder), MAX_CONTENTS_BYTES).decode()
        except (OSError, ValueError):
            return None

    def training_documents(self, spans: Iterable[tuple[int, int]]) -> list[str]:
        """Names of the documents that training tokens start ... stop - 1 of each span belong to, in order; [] where
        the index cannot be read: it is for messages only."""
        path = index_path(self.folder, "train")
        try:
            with open_regular(path, buffering=READ_BYTES) as file:
                return document_names(file, path.stat().st_size, spans)
        except (OSError, ValueError, TypeError):
            return []


def prepare(
    corpus: Corpus, tokenizer: TokenizerConfig, cache_dir: Path, download: bool = True, window: int = 1
) -> Prepared:
    """Open the shards of this corpus under this tokenizer, after building them where they do not exist yet.

    A build appears atomically, so that nothing half-built is ever used; a second process that wants the same waits for
    it. A killed build is continued after its last finished part. Raises UserError for documents
    that cannot be read, a cache folder that cannot be written, or damaged shards; NotFetched where a vocabulary is not
    there, or, unless download, where only a download could build them; and UserError for text to build of whose bytes a
    split could not fill a window of so many tokens.
    """
    if not _prepared_before(cache_dir, f"{corpus.name}-{tokenizer.name}-"):
        tokenizer.check_available()  # before the corpus is read, which may take minutes
    fingerprint = corpus.fingerprint()
    documents = corpus.cache_key()
    identity = [VERSION, fingerprint, documents, tokenizer.name, tokenizer.cache_key()]
    key = digest({"identity": identity})[:12]
    folder = cache_dir / f"{corpus.name}-{tokenizer.name}-{key}"
    if not _exists(folder):
        tokenizer.check_available()
        if not download:
            check_downloaded(corpus, cache_dir)
        _build_once(corpus, fingerprint, tokenizer, folder, window)
    discard_parts(folder)  # left by a kill right after the build
    _check_readable(folder / "tokenizer.json")
    try:
        trained = load_tokenizer(folder / "tokenizer.json")
    except UserError as error:
        raise UserError(f"{error}: delete the folder {folder} and run again to rebuild it") from None
    vocab_warning = tokenizer.vocab_warning(trained)
    if vocab_warning:
        log.warning(vocab_warning)
    train, val = (open_stream(folder, split, trained.hash, corpus.has_prompts) for split in ("train", "val"))
    return Prepared(folder, fingerprint, trained, train, val)


def missing(corpus: Corpus, tokenizer: TokenizerConfig, cache_dir: Path) -> list[str]:
    """What must be fetched before documents can be prepared with these settings, a line each; [] where there is
    nothing. Raises UserError for what no fetching would mend."""
    found = []
    for check in (tokenizer.check_available, corpus.fingerprint, lambda: check_downloaded(corpus, cache_dir)):
        try:
            check()
        except NotFetched as error:
            found.append(str(error))
    return found


def check_downloaded(corpus: Corpus, cache_dir: Path) -> None:
    """Raises NotFetched where documents that are not prepared yet would have to be downloaded."""
    if corpus.remote:
        raise NotFetched(f"the documents of data={corpus.name} are not in {cache_dir} yet: a run downloads them")


def _build_once(corpus: Corpus, fingerprint: str, config: TokenizerConfig, folder: Path, window: int) -> None:
    size = measure(corpus, window) if corpus.has_text else None
    try:
        make_folder(folder.parent)
        busy = f"another process is preparing {folder}: waiting for it"
        guard = lock(lock_file(folder), busy, wait=True)
    except OSError as error:
        raise UserError(
            f"cache_dir={folder.parent} cannot be written: {reason(error)}: give a folder to write to as cache_dir="
        ) from None
    discard_abandoned(folder.parent)  # before more room is needed
    with guard:
        remove_unfinished(folder.parent, folder.name)
        if not _exists(folder):
            try:
                if corpus.has_text:
                    build(corpus, fingerprint, config, folder, size)
                else:
                    copy_tokens(corpus, fingerprint, config, folder)
            except OSError as error:
                kept = "; finished parts are kept" * has_parts(folder)
                raise UserError(
                    f"the shards cannot be written to {folder.parent}: {reason(error)}: make room and run again{kept}"
                ) from None


def _prepared_before(cache_dir: Path, prefix: str) -> bool:
    try:
        return any(name.startswith(prefix) for name in names_in(cache_dir))
    except OSError:  # reported where it matters
        return False


def _exists(folder: Path) -> bool:
    try:
        return exists(folder)
    except OSError as error:
        advice = "make it readable, or give another folder as cache_dir="
        raise_unreadable(f"cache_dir={folder.parent}", error, advice)


def _check_readable(path: Path) -> None:
    """Raises UserError where the file exists, or may exist, but does not open: no reason to rebuild anything."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise_unreadable(path, error, "make it readable, then run again")
