"""Where our tensors lie in the files of a published model, and in which form: each Entry packs some of ours into theirs
and unpacks them again, so that one table serves export and import."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Misfit(ValueError):
    """A published tensor says what a tensor of ours cannot hold, or the other way round."""


class Entry(ABC):
    """Some tensors of ours, `ours`, and those that they are in published files, `published`, by name."""

    ours: tuple[str, ...]
    published: tuple[str, ...]

    @abstractmethod
    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """Ours -> the published ones, in the order of the names. Raises Misfit."""

    @abstractmethod
    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        """The published ones -> ours. Raises Misfit."""


class Same(Entry):
    """One tensor; its matrix perhaps transposed, its rows perhaps in another order."""

    def __init__(self, ours: str, published: str, transposed: bool = False, rows: Tensor | None = None):
        """rows: (n,) int64: published row i is our row rows[i]."""
        self.ours, self.published = (ours,), (published,)
        self.transposed = transposed
        self.rows = rows

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = ours
        tensor = tensor if self.rows is None else tensor[self.rows]
        return [tensor.mT if self.transposed else tensor]

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = published
        tensor = tensor.mT if self.transposed else tensor
        return [tensor if self.rows is None else tensor[self.rows.argsort()]]


class Joined(Entry):
    """Several tensors whose rows lie one after another in one, as GPT-2's queries, keys and values do."""

    def __init__(self, parts: Sequence[str | None], published: str, sizes: Sequence[int], transposed: bool):
        """parts: our names; None for a bias that ours lacks, which is zero. sizes: the rows of each."""
        self.ours, self.published = tuple(part for part in parts if part is not None), (published,)
        self.parts = parts
        self.sizes = list(sizes)
        self.transposed = transposed

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        given = iter(ours)
        pieces = [
            torch.zeros(n) if part is None else next(given) for part, n in zip(self.parts, self.sizes, strict=True)
        ]
        joined = torch.cat(pieces)
        return [joined.mT if self.transposed else joined]

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        (joined,) = published
        pieces = (joined.mT if self.transposed else joined).split(self.sizes)
        if any(part is None and piece.any() for part, piece in zip(self.parts, pieces, strict=True)):
            raise Misfit(f"{self.published[0]} is not zero where a model with these settings has no bias")
        return [piece for part, piece in zip(self.parts, pieces, strict=True) if part is not None]


class PerExpert(Entry):
    """A tensor (experts, rows, cols), of which each expert's matrix is a tensor of its own."""

    def __init__(self, ours: str, published: str, experts: int):
        """published: a name with {e} in it, where the number of the expert stands."""
        self.ours = (ours,)
        self.published = tuple(published.replace("{e}", str(e)) for e in range(experts))

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours[0])

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(published))]


class Twice(Entry):
    """One matrix that is a gate and what is gated: relu(W x) · W x is relu(W x)²."""

    def __init__(self, ours: str, gate: str, up: str):
        self.ours, self.published = (ours,), (gate, up)

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0], ours[0].clone()]

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        gate, up = published
        if not torch.equal(gate, up):
            raise Misfit(f"{self.published[0]} differs from {self.published[1]}, and a squared ReLU has one matrix")
        return [up]


class Zeros(Entry):
    """A tensor that the published model has and ours does not: a bias, which can only be zero."""

    def __init__(self, published: str, shape: Sequence[int]):
        self.ours, self.published = (), (published,)
        self.shape = tuple(shape)

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros(self.shape)]

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        if published[0].any():
            raise Misfit(f"{self.published[0]} is not zero, and a model with these settings has no such bias")
        return []


class Left(Entry):
    """A tensor of ours, a bias, that the published model has no place for: it can be left out where it is zero."""

    def __init__(self, ours: str, shape: Sequence[int]):
        self.ours, self.published = (ours,), ()
        self.shape = tuple(shape)

    def pack(self, ours: Sequence[Tensor]) -> list[Tensor]:
        if ours[0].any():
            raise Misfit(self.ours[0])
        return []

    def unpack(self, published: Sequence[Tensor]) -> list[Tensor]:
        return [torch.zeros(self.shape)]
