"""Examples of a task with one right answer, written in numbers: what a model gets right is counted, besides its loss.

A document is one example: numbers with a space before each, as " 3 67 12", which tokenizer=numbers makes one token of.
All examples are equally long, and their length divides the window, so that a window is whole examples and the answers
have the same places in each.
"""

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np
from pydantic import Field

from common.settings import MAX_COUNT
from data.sources.corpus import Corpus, Document

VERSION = 1  # of the rules by which examples are drawn
HELD_OUT = 10  # every tenth example is


class Draw:
    """Draws from a seed that are the same everywhere: of Python's generator, only random() is promised to stay."""

    def __init__(self, seed: str):
        self.random: Callable[[], float] = random.Random(seed).random

    def number(self, below: int) -> int:
        """One of 0 ... below - 1."""
        return int(self.random() * below)

    def distinct(self, count: int, below: int) -> list[int]:
        """Different numbers of 0 ... below - 1, in random order (Durstenfeld 1964)."""
        moved: dict[int, int] = {}  # what stands in a place, where that is not its own number
        drawn = []
        for i in range(count):
            place = i + self.number(below - i)
            drawn.append(moved.get(place, place))
            moved[place] = moved.get(i, i)
        return drawn


class ExampleCorpus(Corpus):
    """Every tenth example is held out. Training and validation have draws of their own."""

    size: int = Field(ge=2 * HELD_OUT, le=MAX_COUNT)  # examples
    length: int | None = Field(ge=2, le=MAX_COUNT)  # tokens of one, with the end of text before it
    seed: int = Field(ge=0, lt=2**63)

    @property
    @abstractmethod
    def numbers(self) -> int:
        """The numbers that examples are written in are 0 ... numbers - 1."""

    @abstractmethod
    def example(self, draw: Draw) -> list[int]:
        """length - 1 numbers."""

    @abstractmethod
    def answers(self) -> Sequence[int]:
        """The places in an example, from 0, of the numbers that follow from those before them: what is counted."""

    @abstractmethod
    def misfit(self) -> str | None:
        """What of the settings does not fit `length`, in words, with the way out; None where all does."""

    def derive(self, context_length: int) -> Self:
        length = context_length if self.length is None else self.length
        if context_length % length:
            raise ValueError(
                f"data.length={length} does not divide model.context_length={context_length}, and would cut examples: "
                "leave it unset for examples as long as the context, or choose a divisor"
            )
        derived = self.model_copy(update={"length": length})
        misfit = derived.misfit()
        if misfit:
            raise ValueError(misfit)
        return derived

    def counted(self, context_length: int) -> np.ndarray:
        """Target i of a window is token i + 1 of it, of which the first of an example ends the text before: that of an
        example's number i is target i."""
        of_example = np.zeros(self.length, dtype=bool)
        of_example[list(self.answers())] = True
        return np.tile(of_example, context_length // self.length)

    def fingerprint(self) -> str:
        settings = json.dumps([VERSION, self.name, self.model_dump()], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()

    def read(self) -> Iterator[Document]:
        for i in range(self.size):
            held_out = i % HELD_OUT == HELD_OUT - 1
            split = "val" if held_out else "train"
            example = self.example(Draw(f"{self.name}/{self.seed}/{split}/{i}"))
            yield Document(f"{self.name}/{i}", "".join(f" {number}" for number in example), held_out)
