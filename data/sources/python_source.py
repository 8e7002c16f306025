"""Python source on every machine: of SymPy, which is installed with this program, and of the standard library."""

import hashlib
import importlib.util
import logging
import os
import sysconfig
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from common.errors import UserError
from common.paths import raise_unreadable
from data.sources.corpus import Corpus, Document, SplitRule

log = logging.getLogger("headroom")


class SourceCorpus(Corpus):
    """Python source: one file is one document, about one in twenty held out by a hash of its path."""

    without: ClassVar[frozenset[str]]  # names of folders that are left out

    @staticmethod
    @abstractmethod
    def _root() -> Path: ...

    def sources(self) -> list[str]:
        root = self._root()
        return [str(root / path) for path in self._files()]

    def split_rule(self) -> SplitRule:
        return SplitRule(of_files=self.name, of_texts=None)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        root = self._root()
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
        root, found = self._root(), []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if name not in self.without]
            found += [Path(folder, name).relative_to(root).as_posix() for name in names if self._is_source(name)]
        return sorted(found)

    @staticmethod
    def _is_source(name: str) -> bool:
        """Whether a file of this name is part of the corpus."""
        return name.endswith(".py")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise_unreadable(path, error)


class SympyCorpus(SourceCorpus):
    """The source of the installed SymPy, without its tests."""

    without = frozenset({"tests"})

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
        spec = importlib.util.find_spec("sympy")  # without importing the package
        if spec is None or not spec.submodule_search_locations:
            raise UserError("data=sympy: SymPy is not installed: pip install sympy==1.14.0")
        return Path(spec.submodule_search_locations[0])


SYMPY_FINGERPRINT = "33724875dc4043e96838048b2c1c258c7d73e235592f49113a54b94cdc49d9b5"


class StdlibCorpus(SourceCorpus):
    """The standard library of the running Python, which differs between releases; without tests, installed packages,
    and the record of how Python was built on this machine."""

    without = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

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

    @staticmethod
    def _is_source(name: str) -> bool:
        return name.endswith(".py") and not name.startswith("_sysconfigdata")
