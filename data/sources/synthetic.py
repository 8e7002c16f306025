"""Generated text, for tests and first trials."""

import hashlib
import random
from collections.abc import Iterator

from pydantic import Field

from common.settings import MAX_COUNT
from data.sources.corpus import Corpus, Document


class SyntheticCorpus(Corpus):
    """Sentences of a small grammar from a seeded random generator; every tenth document is held out."""

    size: int = Field(ge=10, le=MAX_COUNT)  # documents
    seed: int = Field(ge=0, lt=2**63)

    @property
    def name(self) -> str:
        return "synthetic"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"1/{self.size}/{self.seed}".encode()).hexdigest()

    def read(self) -> Iterator[Document]:
        for i in range(self.size):
            rng = random.Random(f"{self.seed}/{i}")
            sentences = (self._sentence(rng) for _ in range(rng.randint(5, 30)))
            yield Document(f"synthetic/{i}", "".join(sentences), held_out=i % 10 == 9)

    @staticmethod
    def _sentence(rng: random.Random) -> str:
        noun = ("query", "key", "value", "head", "token", "cache", "mask", "layer")
        verb = ("reads", "writes", "sees", "rotates", "keeps")
        adjective = ("narrow ", "latent ", "causal ", "", "")
        return f"The {rng.choice(adjective)}{rng.choice(noun)} {rng.choice(verb)} a {rng.choice(noun)}.\n"
