"""Where documents come from. A corpus is a frozen description; asking it for documents reads them."""

import glob
import hashlib
import importlib.util
import logging
import os
import random
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from data.config import DataConfig
from data.errors import UserError

Split = Literal["train", "val"]
log = logging.getLogger("headroom")


class Document(NamedTuple):
    name: str
    text: str


class Corpus(DataConfig):
    """Yields the same documents in the same order for as long as its fingerprint stays the same."""

    document_mask: bool = False  # tokens see their own document only; says nothing of the documents themselves

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
            digest.update(hashlib.sha256(_read(path)).digest())
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[Document]:
        import datasets  # half a second, and needed only while shards are built

        # Their reader of text files would turn every line end into \n, and unpack what looks like an archive.
        for row in datasets.IterableDataset.from_generator(_texts, gen_kwargs={"paths": self._files()}):
            part = self._part(row["text"], split)
            if part:
                yield Document(row["name"], part)

    def _part(self, text: str, split: Split) -> str:
        goal = int(len(text) * (1 - self.val_fraction))
        cut = text.find("\n", goal) + 1
        if cut in (0, len(text)):  # one long line
            cut = goal
        return text[:cut] if split == "train" else text[cut:]

    def _files(self) -> list[str]:
        found = sorted(
            path for path in glob.glob(os.path.expanduser(self.path), recursive=True) if os.path.isfile(path)
        )
        if not found:
            folder = os.path.isdir(os.path.expanduser(self.path))
            reason = f"is a folder: write {self.path}/*" if folder else f"matches no file (looked from {os.getcwd()})"
            raise UserError(f"data.path={self.path!r} {reason}")
        return found


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _texts(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        content = _read(path)
        if not content:
            raise UserError(f"{path} is empty: remove it, or exclude it from data.path")
        if b"\0" in content:
            raise UserError(f"{path} holds NUL bytes, so it is not text: exclude it")
        try:
            yield {"name": path, "text": content.decode()}
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (at byte {error.start}): convert or exclude it") from None


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
