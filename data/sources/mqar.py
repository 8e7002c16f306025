"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927): key-value pairs, then each key
again, which its value must follow."""

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from common.settings import MAX_COUNT
from data.sources.examples import Draw, ExampleCorpus


class MQARCorpus(ExampleCorpus):
    """key value key value ... filler ... key value key value ...: different keys, the filler, and the same pairs in an
    order of their own. The values of the second time are counted.

    Keys are the numbers 0 ... keys - 1, values the next ones, the filler is the last number. In the paper queries stand
    apart from each other, no value follows them, and no value belongs to two keys. Here the filler keeps all queries
    away from the pairs, and values are drawn one by one: where answers are in view and none comes twice, a model learns
    to strike out what was answered, which is right in 41 of 100 cases of six, and may stay with that.
    """

    pairs: int = Field(ge=1, le=MAX_COUNT)
    keys: int = Field(ge=1, le=MAX_COUNT)
    values: int = Field(ge=1, le=MAX_COUNT)

    @model_validator(mode="after")
    def _vocabulary_is_large_enough(self) -> Self:
        if self.pairs > self.keys:
            raise ValueError(
                f"data.pairs={self.pairs} needs as many different keys, data.keys={self.keys} has fewer: choose "
                f"at most {self.keys} pairs, or more keys"
            )
        return self

    @property
    def name(self) -> str:
        return "mqar"

    @property
    def numbers(self) -> int:
        return self.keys + self.values + 1

    def misfit(self) -> str | None:
        most = (self.length - 1) // 4
        if self.pairs <= most:
            return None
        return (
            f"data.pairs={self.pairs} makes examples of {4 * self.pairs + 1} tokens, data.length={self.length} is "
            f"less: choose at most {most} pairs, or a model.context_length of {4 * self.pairs + 1} or more"
        )

    def example(self, draw: Draw) -> list[int]:
        keys = draw.distinct(self.pairs, self.keys)
        values = [self.keys + draw.number(self.values) for _ in keys]
        filler = [self.numbers - 1] * (self.length - 1 - 4 * self.pairs)
        asked = draw.distinct(self.pairs, self.pairs)
        pairs = [number for pair in zip(keys, values, strict=True) for number in pair]
        return [*pairs, *filler, *(number for i in asked for number in (keys[i], values[i]))]

    def answers(self) -> Sequence[int]:
        end = self.length - 1
        return range(end - 2 * self.pairs + 1, end, 2)
