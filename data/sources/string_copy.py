"""Copying (Jelassi et al. 2024, "Repeat After Me", arXiv:2402.01032): a random string, a separator, and the string
again."""

from collections.abc import Sequence

from pydantic import Field

from common.settings import MAX_COUNT
from data.sources.examples import Draw, ExampleCorpus


class CopyCorpus(ExampleCorpus):
    """The second string is counted. Its symbols are the numbers 0 ... symbols - 1, the separator is the next one."""

    symbols: int = Field(ge=2, le=MAX_COUNT)

    @property
    def name(self) -> str:
        return "copy"

    @property
    def numbers(self) -> int:
        return self.symbols + 1

    def misfit(self) -> str | None:
        if self.length >= 4 and self.length % 2 == 0:
            return None
        return (
            f"data.length={self.length} is not the end of text, a separator and a string twice: give an even number of "
            "4 or more"
        )

    def example(self, draw: Draw) -> list[int]:
        string = [draw.number(self.symbols) for _ in range(self.length // 2 - 1)]
        return [*string, self.symbols, *string]

    def answers(self) -> Sequence[int]:
        return range(self.length // 2, self.length - 1)
