"""Where documents come from. A corpus is a frozen description; asking it for documents reads them."""

import glob
import hashlib
import importlib.util
import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from data.errors import UserError

Split = Literal["train", "val"]
log = logging.getLogger("headroom")


class Document(NamedTuple):
    name: str
    text: str


class Corpus(BaseModel, ABC):
    """Yields the same documents in the same order for as long as its fingerprint stays the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """A short word for folders."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents change. Raises UserError where there is nothing to read."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Raises UserError, naming the file, where one cannot be read as text."""


class SympyCorpus(Corpus):
    """The source of the installed SymPy, without its tests: one file is one document, about one in twenty held out."""

    @property
    def name(self) -> str:
        return "sympy"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._files():
            digest.update(path.encode() + b"\0" + (self._root() / path).read_bytes() + b"\0")
        found = digest.hexdigest()
        if found != SYMPY_FINGERPRINT:
            log.warning(
                f"the installed SymPy (fingerprint {found[:12]}) is not the source of sympy==1.14.0 "
                f"({SYMPY_FINGERPRINT[:12]}): losses will not compare with those of other machines"
            )
        return found

    def documents(self, split: Split) -> Iterator[Document]:
        for path in self._files():
            held_out = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % 20 == 0
            if held_out == (split == "val"):
                yield Document(path, (self._root() / path).read_bytes().decode())

    @staticmethod
    def _root() -> Path:
        spec = importlib.util.find_spec("sympy")  # finds the folder without importing the package
        if spec is None or not spec.submodule_search_locations:
            raise UserError("data=sympy: SymPy is not installed: pip install sympy==1.14.0")
        return Path(spec.submodule_search_locations[0])

    def _files(self) -> list[str]:
        paths = (path.relative_to(self._root()) for path in self._root().rglob("*.py"))
        return sorted(path.as_posix() for path in paths if "tests" not in path.parts)


SYMPY_FINGERPRINT = "33724875dc4043e96838048b2c1c258c7d73e235592f49113a54b94cdc49d9b5"


class FilesCorpus(Corpus):
    """Text files, one document each. The last part of every file is held out, cut after a line's end: it works for
    one file as for a thousand."""

    path: str = Field(min_length=1)
    val_fraction: float = Field(0.1, gt=0, lt=1)

    @property
    def name(self) -> str:
        return "files"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._files():
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        import datasets  # half a second, and needed only while shards are built

        files = self._files()
        # Streamed: nothing is copied into a cache of theirs. sample_by="document" gives one row per file, in order.
        rows = iter(
            datasets.load_dataset(
                "text", data_files={"train": files}, split="train", streaming=True, sample_by="document"
            )
        )
        for path in files:
            try:
                text = next(rows)["text"]
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text (at byte {error.start}): convert or exclude it") from None
            if "\0" in text:
                raise UserError(f"{path} holds NUL bytes, so it is not text: exclude it")
            part = self._part(text, split)
            if part:
                yield Document(path, part)

    def _part(self, text: str, split: Split) -> str:
        cut = text.find("\n", int(len(text) * (1 - self.val_fraction))) + 1
        cut = cut or int(len(text) * (1 - self.val_fraction))
        return text[:cut] if split == "train" else text[cut:]

    def _files(self) -> list[str]:
        found = sorted(
            path for path in glob.glob(os.path.expanduser(self.path), recursive=True) if os.path.isfile(path)
        )
        if not found:
            raise UserError(f"data.path={self.path!r} matches no file (looked from {os.getcwd()})")
        for path in found:
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} cannot be read: permission denied")
            if os.path.getsize(path) == 0:
                raise UserError(f"{path} is empty: remove it or exclude it from data.path={self.path!r}")
        return found


class SyntheticCorpus(Corpus):
    """Sentences of a small grammar, drawn by a seeded generator; every tenth document is held out."""

    size: int = Field(200, ge=10)  # documents
    seed: int = Field(0, ge=0)

    @property
    def name(self) -> str:
        return "synthetic"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"1/{self.size}/{self.seed}".encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        for i in range(self.size):
            if (i % 10 == 9) == (split == "val"):
                draw = random.Random(f"{self.seed}/{i}")
                sentences = (self._sentence(draw) for _ in range(draw.randint(5, 30)))
                yield Document(f"synthetic/{i}", "".join(sentences))

    @staticmethod
    def _sentence(draw: random.Random) -> str:
        noun = ("query", "key", "value", "head", "token", "cache", "mask", "layer")
        verb = ("reads", "writes", "sees", "rotates", "keeps")
        adjective = ("narrow ", "latent ", "causal ", "", "")
        return f"The {draw.choice(adjective)}{draw.choice(noun)} {draw.choice(verb)} a {draw.choice(noun)}.\n"
