"""A needle in a haystack: one key-value pair at a random depth of random filler, and the key again at the end."""

from collections.abc import Sequence

from pydantic import Field

from common.settings import MAX_COUNT
from data.sources.examples import Draw, ExampleCorpus


class NeedleCorpus(ExampleCorpus):
    """filler ... key value ... filler key value: the last value is counted. Keys are the numbers 0 ... keys - 1, values
    the next ones, the filler is drawn from the last `fillers` numbers."""

    keys: int = Field(ge=1, le=MAX_COUNT)
    values: int = Field(ge=1, le=MAX_COUNT)
    fillers: int = Field(ge=1, le=MAX_COUNT)

    @property
    def name(self) -> str:
        return "needle"

    @property
    def numbers(self) -> int:
        return self.keys + self.values + self.fillers

    def misfit(self) -> str | None:
        shortest = 5
        if self.length >= shortest:
            return None
        return f"data.length={self.length} has no room for two pairs and the end of text: give {shortest} or more"

    def example(self, draw: Draw) -> list[int]:
        pair = [draw.number(self.keys), self.keys + draw.number(self.values)]
        count = self.length - 5
        filler = [self.keys + self.values + draw.number(self.fillers) for _ in range(count)]
        depth = draw.number(count + 1)
        return [*filler[:depth], *pair, *filler[depth:], *pair]

    def answers(self) -> Sequence[int]:
        return [self.length - 2]
