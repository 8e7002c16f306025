"""Where documents come from. A corpus is a frozen description; asking it for documents reads them."""

import hashlib
import importlib.util
import logging
import random
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field

from common.errors import UserError
from common.paths import refuse_unreadable
from common.settings import FrozenSettings

Split = Literal["train", "val"]
HeldOutBy = Literal["content", "index"]
log = logging.getLogger("headroom")


class Document(NamedTuple):
    name: str
    text: str
    held_out: bool  # of the validation split
    goes_on: bool = False  # where the one before it in its split ended: a long document comes in parts

    @property
    def split(self) -> Split:
        return "val" if self.held_out else "train"


class SplitRule(NamedTuple):
    """Two corpora of equal rules that read one file hold out the same documents of it."""

    of_files: Any  # how files become documents, and which of those are held out
    of_texts: float | None  # the share of documents that a hash of their text holds out; None where no hash does


class Corpus(FrozenSettings, ABC):
    """Reads the same documents in the same order for as long as its fingerprint and its settings stay the same."""

    document_mask: bool = False  # tokens see their own document only; says nothing of the documents themselves

    @property
    @abstractmethod
    def name(self) -> str:
        """A short word for folders."""

    @property
    def remote(self) -> bool:
        """Reading is a download, so it is not done just to look."""
        return False

    def identity(self) -> dict[str, Any]:
        """The settings that the documents depend on, besides what the fingerprint tells."""
        return self.model_dump(exclude={"document_mask"})

    def pinned(self) -> Self:
        """The same documents, whatever becomes of the name they were found under: what a run keeps."""
        return self

    def sources(self) -> list[str]:
        """The files of this machine that the documents are read from."""
        return []

    def split_rule(self) -> "SplitRule | None":
        """By which documents are held out; None where it is not a function of the document alone."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents change. Raises UserError where there is nothing to read."""

    @abstractmethod
    def read(self) -> Iterator[Document]:
        """The documents of both splits, in one pass and never all in memory. Raises UserError, naming the place, where
        one cannot be read as text."""

    def documents(self, split: Split) -> Iterator[Document]:
        return (document for document in self.read() if document.split == split)


def held_out(by: HeldOutBy, index: int, text: str, share: float) -> bool:
    """Whether a document of many is one of the share that is held out. By content, documents of the same text are on
    the same side, wherever they stand; by index, they need not be."""
    return drawn(index if by == "index" else hashlib.sha256(text.encode()).hexdigest(), share)


def drawn(index: int | str, share: float, purpose: str = "validation") -> bool:
    """Whether the document of this index is one of the share that is drawn: a hash decides, so it depends neither on
    how many follow nor on what they hold."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{index}".encode()).digest()[:8], "big") < share * 2**64


class SourceCorpus(Corpus):
    """Python source: one file is one document, about one in twenty held out by a hash of its path."""

    @staticmethod
    @abstractmethod
    def _root() -> Path: ...

    @abstractmethod
    def _belongs(self, path: Path) -> bool:
        """path: within the root."""

    def sources(self) -> list[str]:
        root = self._root()
        return [str(root / path) for path in self._files()]

    def split_rule(self) -> SplitRule:
        return SplitRule(of_files=self.name, of_texts=None)

    def fingerprint(self) -> str:
        digest, root = hashlib.sha256(), self._root()
        for path in self._files():
            digest.update(path.encode() + b"\0" + _content(root / path) + b"\0")
        return digest.hexdigest()

    def read(self) -> Iterator[Document]:
        root = self._root()
        for path in self._files():
            held_out = int.from_bytes(hashlib.sha256(path.encode()).digest(), "big") % 20 == 0
            try:
                text = _content(root / path).decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{root / path} is not UTF-8 text (at byte {error.start}): mend it") from None
            yield Document(path, text, held_out)

    def _files(self) -> list[str]:
        root = self._root()
        paths = (path.relative_to(root) for path in root.rglob("*.py"))
        return sorted(path.as_posix() for path in paths if self._belongs(path))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        refuse_unreadable(path, error)


class SympyCorpus(SourceCorpus):
    """The source of the installed SymPy, without its tests."""

    @property
    def name(self) -> str:
        return "sympy"

    def fingerprint(self) -> str:
        found = super().fingerprint()
        if found != SYMPY_FINGERPRINT:
            log.warning(
                f"the installed SymPy (fingerprint {found[:12]}) is not the source of sympy==1.14.0 "
                f"({SYMPY_FINGERPRINT[:12]}): losses will not compare with those of other machines"
            )
        return found

    @staticmethod
    def _root() -> Path:
        spec = importlib.util.find_spec("sympy")  # finds the folder without importing the package
        if spec is None or not spec.submodule_search_locations:
            raise UserError("data=sympy: SymPy is not installed: pip install sympy==1.14.0")
        return Path(spec.submodule_search_locations[0])

    def _belongs(self, path: Path) -> bool:
        return "tests" not in path.parts


SYMPY_FINGERPRINT = "33724875dc4043e96838048b2c1c258c7d73e235592f49113a54b94cdc49d9b5"


class StdlibCorpus(SourceCorpus):
    """The standard library of the Python that runs, another one with every release; without tests, what is installed
    beside it, and what building it recorded of the machine."""

    @property
    def name(self) -> str:
        return "stdlib"

    def fingerprint(self) -> str:
        if not self._files():
            raise UserError(f"data=stdlib: {self._root()} holds no Python source: use a Python that ships it")
        return super().fingerprint()

    @staticmethod
    def _root() -> Path:
        return Path(sysconfig.get_paths()["stdlib"])

    def _belongs(self, path: Path) -> bool:
        beside = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        return not beside & set(path.parts) and not path.name.startswith("_sysconfigdata")


class SyntheticCorpus(Corpus):
    """Sentences of a small grammar, drawn by a seeded generator; every tenth document is held out."""

    size: int = Field(200, ge=10)  # documents
    seed: int = Field(0, ge=0)

    @property
    def name(self) -> str:
        return "synthetic"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"1/{self.size}/{self.seed}".encode()).hexdigest()

    def read(self) -> Iterator[Document]:
        for i in range(self.size):
            draw = random.Random(f"{self.seed}/{i}")
            sentences = (self._sentence(draw) for _ in range(draw.randint(5, 30)))
            yield Document(f"synthetic/{i}", "".join(sentences), held_out=i % 10 == 9)

    @staticmethod
    def _sentence(draw: random.Random) -> str:
        noun = ("query", "key", "value", "head", "token", "cache", "mask", "layer")
        verb = ("reads", "writes", "sees", "rotates", "keeps")
        adjective = ("narrow ", "latent ", "causal ", "", "")
        return f"The {draw.choice(adjective)}{draw.choice(noun)} {draw.choice(verb)} a {draw.choice(noun)}.\n"
