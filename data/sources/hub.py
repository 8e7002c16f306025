"""Datasets of the Hugging Face hub, streamed; or a folder on this machine that the same library reads."""

import functools
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field

from common.errors import UserError, reason
from common.paths import files_below, is_folder, raise_unreadable
from data.sources.corpus import Corpus, Document, HeldOutBy, SplitRule, is_held_out
from data.sources.tables import cells, format_of, listed, no_column, no_text, refuse_lacking, refuse_no_column

PATIENCE = 5  # seconds for the hub to answer; the library alone would try for half a minute
T = TypeVar("T")


class HubCorpus(Corpus):
    """One row is one document; a hash of its text (or of its index) holds it out.

    Fingerprint: of the hub, the commit that data.revision names at the time; of a folder, the names and bytes of its
    files. The other settings are compared by themselves wherever fingerprints are.
    """

    path: str = Field(min_length=1)
    config: str | None = None
    split: str = Field("train", min_length=1)
    column: str = Field("text", min_length=1)
    revision: str | None = None
    limit: int | None = Field(None, ge=1)
    val_fraction: float = Field(0.01, gt=0, lt=1)
    held_out_by: HeldOutBy = "content"

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
        """Without what the fingerprint tells, and what is as it was before it was a setting."""
        tree = super().cache_key()
        del tree["revision"]
        if self.held_out_by == "index":
            del tree["held_out_by"]
        return tree

    def sources(self) -> list[str]:
        return [str(path) for path in files_below(Path(self._place))] if self._folder else []

    def split_rule(self) -> SplitRule | None:
        if self.held_out_by == "index":
            return None
        return SplitRule(["hub", self.config, self.split, self.column, self.val_fraction], self.val_fraction)

    def with_fixed_revision(self) -> Self:
        return self.model_copy(update={"revision": self._commit})

    def read(self) -> Iterator[Document]:
        rows, index, complete = self._open(), 0, self.remote  # of a folder, rows that lack the column are refused
        while True:
            row = self._asked(lambda: next(rows, None), f" (after {index} documents)")
            if row is None:
                return
            text, name = row[self.column], f"{self.path}:{index + 1}"  # rows are counted from 1, as in tables
            if text is not None and not isinstance(text, str):
                raise UserError(no_text(name, self.column, text))
            if text:
                yield Document(name, text, is_held_out(self.held_out_by, index, text, self.val_fraction))
            elif text is None and not complete:
                self._refuse_lacking()
                complete = True
            index += 1

    @property
    def _place(self) -> str:
        """Of a folder, also one written with ~; a name on the hub has none."""
        return os.path.expanduser(self.path)

    @property
    def _folder(self) -> bool:
        return is_folder(self._place)

    @property
    def _commit(self) -> str | None:
        return None if self._folder else _commit_of(self.path, self.revision)

    def _open(self) -> Iterator[dict[str, Any]]:
        """Raises UserError, listing what there is, for a config, split or column that is not there."""
        import datasets  # half a second, and needed only here

        if self.remote:
            _refuse_unreachable(self.path)
        else:
            _refuse_several_formats(Path(self._place))
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes as an error, too
        where = {"path": self._place, "revision": self._commit}
        configs = self._asked(lambda: datasets.get_dataset_config_names(**where))
        config = self.config or (configs[0] if len(configs) == 1 else None)
        if config not in configs:
            problem = f"data.config={self.config}" if self.config else "data.config is not set"
            raise UserError(f"{problem}: {self.path} has {listed(configs)}: give one of them as data.config=")
        splits = self._asked(lambda: datasets.get_dataset_split_names(**where, config_name=config))
        if self.split not in splits:
            raise UserError(f"data.split={self.split}: {self.path} has {listed(splits)}: choose one of them")
        stream = self._asked(lambda: datasets.load_dataset(**where, name=config, split=self.split, streaming=True))
        columns = stream.column_names or list(self._asked(lambda: next(iter(stream), {})))
        if self.column not in columns:
            raise UserError(no_column(self.path, self.column, columns))
        stream = stream.select_columns([self.column])
        return iter(stream.take(self.limit) if self.limit else stream)

    def _refuse_lacking(self) -> None:
        """Raises UserError for a row of a JSON file that lacks the column, as data=files does: the library gives null
        for it. Of the hub's files nobody can tell."""
        import datasets

        if (Path(self._place) / "README.md").is_file():  # whose head may say to read them in another way
            return
        builder, left = self._asked(lambda: datasets.load_dataset_builder(self._place, self.config)), self.limit
        for path in builder.config.data_files[self.split]:
            if format_of(path) in ("json", "json lines"):
                looked_at = refuse_lacking(path, self.column, left)
                left = left and max(0, left - looked_at)

    def _asked(self, question: Callable[[], T], when: str = "") -> T:
        try:
            return question()
        except Exception as error:  # whatever reads the network, archives and formats underneath has its own
            if self._folder:
                _refuse_bad_table(Path(self._place), self.column)  # theirs seldom say which file it was
            raise UserError(f"data.path={self.path!r} cannot be read{when}: {_reason(error)}") from None


@functools.cache
def _commit_of(path: str, revision: str | None) -> str:
    """The commit that a branch, a tag or nothing stands for. One that is given whole needs no network."""
    if revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return revision
    _refuse_no_name(path)
    _refuse_unreachable(path)
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=PATIENCE).sha
    except Exception as error:  # theirs for what is missing, private, or malformed, and their HTTP library's
        raise UserError(f"{_no_folder(path)}, nor does the hub have it: {_reason(error)}") from None


def _refuse_no_name(path: str) -> None:
    """Before the hub is asked. It redirects a few old names without an owner, so those pass."""
    if os.path.isfile(path):
        raise UserError(f"data.path={path!r} is a file: data=files reads it, data=hub its folder")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"data.path={path!r} is no folder, nor named owner/name as a dataset of the hub is: give one")


def _no_folder(path: str) -> str:
    hint = "" if "/" in path else " (a dataset of the hub is named owner/name)"
    return f"data.path={path!r} is no folder{hint}"


def _refuse_unreachable(path: str) -> None:
    way_out = "give a folder of this machine, or a whole commit as data.revision= for what is prepared already"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{_no_folder(path)}, and HF_HUB_OFFLINE keeps from asking the hub: {way_out}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        fault = f"{endpoint} does not answer: {_reason(error)}"
        raise UserError(f"{_no_folder(path)}, and {fault}: {way_out}") from None


def _refuse_several_formats(folder: Path) -> None:
    """The library would take the most common one, and leave the others out without a word."""
    found = {format_of(path.name): path.name for path in files_below(folder)}
    for other in (None, "json"):  # .json files may be there to describe the others
        found.pop(other, None)
    if len(found) > 1 and not (folder / "README.md").is_file():  # whose head may say which files are meant
        raise UserError(
            f"data.path={str(folder)!r} holds tables of several formats, such as {' and '.join(found.values())}: "
            "give a folder with one of them"
        )


def _refuse_bad_table(folder: Path, column: str) -> None:
    """Raises UserError with the file and the line of the first table in the folder that cannot be read, if one is of a
    format known here."""
    for path in map(str, files_below(folder)):
        if format_of(path) not in (None, "json"):
            refuse_no_column(path, column)
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
