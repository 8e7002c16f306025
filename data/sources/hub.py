"""Datasets of the Hugging Face hub, streamed; or a local folder, read by the same library."""

import functools
import hashlib
import itertools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field

from common.errors import NotFetched, UserError, reason
from common.paths import files_below, is_folder, raise_unreadable
from common.settings import MAX_COUNT
from data.sources.corpus import Corpus, Document, HeldOutBy, SplitRule, is_held_out
from data.sources.row_counts import RowCounts
from data.sources.tables import (
    COLUMN,
    cells,
    check_column,
    format_of,
    list_names,
    no_column_message,
    not_text_message,
    rows,
)

TIMEOUT = 5  # seconds for the hub to answer; the library alone would retry for half a minute
T = TypeVar("T")


class HubCorpus(Corpus):
    """One row is one document; a hash of its text (or of its index) holds it out.

    Fingerprint: on the hub, the commit that data.revision names at the time; of a folder, the names and bytes of its
    files. Settings are compared separately wherever fingerprints are.
    """

    path: str = Field(min_length=1)
    config: str | None
    split: str = Field(min_length=1)
    column: str = Field(min_length=1)
    revision: str | None
    limit: int | None = Field(ge=1, le=MAX_COUNT)
    val_fraction: float = Field(gt=0, lt=1)
    held_out_by: HeldOutBy

    @property
    def name(self) -> str:
        return "hub"

    @property
    def remote(self) -> bool:
        return not self._folder

    def fingerprint(self) -> str:
        if self._folder:
            return _hash(Path(self._place))
        return hashlib.sha256(f"1/{self.path}/{self._commit}".encode()).hexdigest()

    def cache_key(self) -> dict[str, Any]:
        """The settings without the revision, which the fingerprint covers, and without held_out_by=index: older
        versions, which split by it, had no key."""
        settings = super().cache_key()
        del settings["revision"]
        if self.held_out_by == "index":
            del settings["held_out_by"]
        return settings

    def sources(self) -> list[str]:
        return [str(path) for path in files_below(Path(self._place))] if self._folder else []

    def split_rule(self) -> SplitRule | None:
        if self.held_out_by == "index":
            return None
        return SplitRule(["hub", self.config, self.split, self.column, self.val_fraction], self.val_fraction)

    def with_fixed_revision(self) -> Self:
        return self.model_copy(update={"revision": self._commit})

    def read(self) -> Iterator[Document]:
        return self.read_counting(RowCounts())

    def read_counting(self, counts: RowCounts) -> Iterator[Document]:
        stream = self._open()
        index = 0
        columns_checked = self.remote  # only the files of a folder can be checked
        while True:
            row = self._ask(lambda: next(stream, None), f" (after {index} documents)")
            if row is None:
                return
            text = row[self.column]
            name = f"{self.path}:{index + 1}"  # rows are counted from 1, as in tables
            if text is not None and not isinstance(text, str):
                raise UserError(not_text_message(name, self.column, text))
            counts.add(f"no text (column {self.column})", not text)
            if text:
                yield Document(name, text, is_held_out(self.held_out_by, index, text, self.val_fraction))
            elif text is None and not columns_checked:
                self._check_files_have_column()
                columns_checked = True
            index += 1

    @property
    def _place(self) -> str:
        """The path with ~ expanded; a name on the hub has none."""
        return os.path.expanduser(self.path)

    @property
    def _folder(self) -> bool:
        return is_folder(self._place)

    @property
    def _commit(self) -> str | None:
        return None if self._folder else _commit_of(self.path, self.revision)

    def _open(self) -> Iterator[dict[str, Any]]:
        """Open the stream of rows. Raises UserError, listing the choices, for a missing config, split or column."""
        import datasets  # imported here: it takes half a second

        if self.remote:
            _check_reachable(self.path)
        else:
            _check_one_format(Path(self._place))
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is also raised as an error
        where = {"path": self._place, "revision": self._commit}
        configs = self._ask(lambda: datasets.get_dataset_config_names(**where))
        config = self.config or (configs[0] if len(configs) == 1 else None)
        if config not in configs:
            problem = f"data.config={self.config}" if self.config else "data.config is not set"
            raise UserError(f"{problem}: {self.path} has {list_names(configs)}: give one of them as data.config=")
        splits = self._ask(lambda: datasets.get_dataset_split_names(**where, config_name=config))
        if self.split not in splits:
            raise UserError(f"data.split={self.split}: {self.path} has {list_names(splits)}: choose one of them")
        stream = self._ask(lambda: datasets.load_dataset(**where, name=config, split=self.split, streaming=True))
        columns = stream.column_names or list(self._ask(lambda: next(iter(stream), {})))
        if self.column not in columns:
            raise UserError(no_column_message(self.path, self.column, columns))
        stream = stream.select_columns([self.column])
        return iter(stream.take(self.limit) if self.limit else stream)

    def _check_files_have_column(self) -> None:
        """Raises UserError for a local JSON file of which no row has the column, as data=files does: the library gives
        null for all. Files after data.limit are not read, and those on the hub cannot be checked."""
        import datasets

        if (Path(self._place) / "README.md").is_file():  # its header may configure how files are read
            return
        builder = self._ask(lambda: datasets.load_dataset_builder(self._place, self.config))
        left = self.limit
        for path in builder.config.data_files[self.split]:
            if format_of(path) not in ("json", "json lines"):
                continue
            check_column(path, self.column)
            if left is not None:
                left -= sum(1 for _ in itertools.islice(rows(path, {COLUMN: self.column}), left))
                if left == 0:
                    return

    def _ask(self, question: Callable[[], T], when: str = "") -> T:
        try:
            return question()
        except Exception as error:  # each library for network, archives and formats raises its own
            if self._folder:
                _check_tables(Path(self._place), self.column)  # their errors seldom name the file
            raise UserError(f"data.path={self.path!r} cannot be read{when}: {_reason(error)}") from None


@functools.cache
def _commit_of(path: str, revision: str | None) -> str:
    """Look up the commit that a branch, a tag or None (the newest) names. A full commit hash needs no network."""
    if revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return revision
    _check_hub_name(path)
    _check_reachable(path)
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=TIMEOUT).sha
    except Exception as error:  # for missing, private or malformed names, and of their HTTP library
        raise UserError(f"{_no_folder_message(path)}, nor does the hub have it: {_reason(error)}") from None


def _check_hub_name(path: str) -> None:
    """Raises UserError for a path that cannot name a dataset. The hub redirects a few old names without an owner, so
    those pass."""
    if os.path.isfile(path):
        raise UserError(f"data.path={path!r} is a file: data=files reads it, data=hub its folder")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"data.path={path!r} is no folder, nor named owner/name as a dataset of the hub is: give one")


def _no_folder_message(path: str) -> str:
    hint = "" if "/" in path else " (a dataset of the hub is named owner/name)"
    return f"data.path={path!r} is no folder{hint}"


def _check_reachable(path: str) -> None:
    way_out = "give a folder of this machine, or a whole commit as data.revision= for what is prepared already"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise NotFetched(f"{_no_folder_message(path)}, and HF_HUB_OFFLINE keeps from asking the hub: {way_out}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        fault = f"{endpoint} does not answer: {_reason(error)}"
        raise NotFetched(f"{_no_folder_message(path)}, and {fault}: {way_out}") from None


def _check_one_format(folder: Path) -> None:
    """Raises UserError for tables of several formats: the library would read the most common one and silently skip the
    others."""
    found = {format_of(path.name): path.name for path in files_below(folder)}
    for other in (None, "json"):  # .json files may only describe the others
        found.pop(other, None)
    if len(found) > 1 and not (folder / "README.md").is_file():  # its header may select files
        raise UserError(
            f"data.path={str(folder)!r} holds tables of several formats, such as {' and '.join(found.values())}: "
            "give a folder with one of them"
        )


def _check_tables(folder: Path, column: str) -> None:
    """Raises UserError with the file and the line of the first table in the folder that cannot be read, among those in
    formats that this program reads."""
    for path in map(str, files_below(folder)):
        if format_of(path) not in (None, "json"):
            check_column(path, column)
            for _ in cells(path, column):
                pass


def _reason(error: object) -> str:
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    if isinstance(error, OSError) and error.strerror:
        return reason(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _hash(folder: Path) -> str:
    digest = hashlib.sha256(b"1")
    files = files_below(folder)
    if not files:
        raise UserError(f"data.path={str(folder)!r} is an empty folder: give one with data files")
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise_unreadable(path, error)
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()
