"""Mix several corpora in fixed proportions."""

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, SerializeAsAny, field_validator

from common.errors import UserError
from common.paths import FileId, file_ids
from common.settings import FrozenSettings
from data.sources.corpus import Corpus, Document
from data.sources.row_counts import RowCounts

log = logging.getLogger("headroom")


class Part(FrozenSettings):
    quota: float = Field(ge=1e-30, le=1e30)  # bytes of text over it stay finite
    corpus: SerializeAsAny[Corpus]

    @property
    def name(self) -> str:
        return self.corpus.name


class MixCorpus(Corpus):
    """The next document comes from the part that is furthest behind its quota, in bytes of training text. The mix ends
    with the first part that ends, so the quotas are met at any point, to within a document. Documents that the parts
    hold out are held out. The order is a function of the settings and the documents alone."""

    parts: dict[str, Part]  # quotas count relative to their sum

    @field_validator("parts", mode="before")
    @classmethod
    def _check_not_empty(cls, parts: Any) -> Any:
        if not isinstance(parts, dict) or not parts:
            given = "null" if parts is None else parts
            example = "'data.parts={sympy: 0.7, stdlib: 0.3}'"
            raise ValueError(f"data.parts={given} names no corpus: give each one its quota, as in {example}")
        return parts

    @property
    def name(self) -> str:
        return "mix"

    def derive(self, context_length: int) -> Self:
        for name, part in self.parts.items():
            if part.corpus.numbers is not None:
                raise ValueError(
                    f"data.parts.{name} is data={part.name}, whose examples fill whole windows and cannot be mixed: "
                    f"train on data={part.name} alone"
                )
            if not part.corpus.has_text:
                raise ValueError(
                    f"data.parts.{name} is data={part.name}, which has no documents of text to be mixed: train on it "
                    "alone"
                )
        return self

    @property
    def has_prompts(self) -> bool:
        return any(part.corpus.has_prompts for part in self.parts.values())

    @property
    def remote(self) -> bool:
        return any(part.corpus.remote for part in self.parts.values())

    def fingerprint(self) -> str:
        found = {name: [part.quota, part.corpus.fingerprint()] for name, part in self.parts.items()}
        self._check_splits_agree()
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def cache_key(self) -> dict[str, Any]:
        return {name: [part.quota, part.name, part.corpus.cache_key()] for name, part in self.parts.items()}

    def with_fixed_revision(self) -> Self:
        parts = {
            name: Part(quota=part.quota, corpus=part.corpus.with_fixed_revision()) for name, part in self.parts.items()
        }
        return self.model_copy(update={"parts": parts})

    def sources(self) -> list[str]:
        return list(file_ids(path for part in self.parts.values() for path in part.corpus.sources()).values())

    def _check_splits_agree(self) -> None:
        """Raises UserError where one part might train on a document that another holds out: both read one file but
        split it by different rules, or both split by hashes of texts but in different fractions."""
        rules = {name: part.corpus.split_rule() for name, part in sorted(self.parts.items())}
        rules = {name: rule for name, rule in rules.items() if rule is not None}
        first = next((name for name, rule in rules.items() if rule.of_texts is not None), None)
        readers: dict[FileId, str] = {}
        for name, rule in rules.items():
            if rule.of_texts not in (None, first and rules[first].of_texts):
                raise UserError(
                    f"data.parts.{first}.val_fraction={rules[first].of_texts} and "
                    f"data.parts.{name}.val_fraction={rule.of_texts} would train on texts in one part that the other "
                    "holds out, where both have them: give both the same val_fraction"
                )
            for file_id, path in file_ids(self.parts[name].corpus.sources()).items():
                other = readers.setdefault(file_id, name)
                if rules[other].of_files != rule.of_files:
                    raise UserError(
                        f"data.parts.{other} and data.parts.{name} both read {path}, and each would train on what the "
                        "other holds out: give one of them other files, or both the same document, column and "
                        "val_fraction"
                    )

    def read(self) -> Iterator[Document]:
        return self.read_counting(RowCounts())

    def read_counting(self, counts: RowCounts) -> Iterator[Document]:
        names = sorted(self.parts)  # sorted, so that equal settings give equal documents
        readers = {name: _Reader(self.parts[name].corpus, counts.of(name)) for name in names}
        while True:
            name = min(names, key=lambda name: readers[name].taken / self.parts[name].quota)
            for document in readers[name].next_training():
                yield document._replace(name=f"{name}/{document.name}")
            if readers[name].ended:
                shares = ", ".join(f"{readers[n].taken / 1e6:.1f} MB of {n}" for n in names)
                log.debug(f"data=mix ends with {name}, the first that is used up: {shares}")
                return


class _Reader:
    """The reading position of a part."""

    def __init__(self, corpus: Corpus, counts: RowCounts):
        self.documents = corpus.read_counting(counts)
        self.ahead: Document | None = None  # read, but not yet returned
        self.taken = 0  # bytes of training text
        self.ended = False

    def next_training(self) -> Iterator[Document]:
        """One training document with all its continuations, after the held-out documents before it."""
        began = False
        while True:
            document = self.ahead or next(self.documents, None)
            self.ahead = None
            if document is None:
                self.ended = True
                return
            if began and not document.is_continuation:
                self.ahead = document
                return
            if not document.held_out:
                began = True
                self.taken += len(document.text.encode())
            yield document
