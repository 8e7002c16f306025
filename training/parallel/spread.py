"""Spread: of matrices that an optimizer needs whole, each goes to one process, which returns what it makes of it.

A step sends each matrix to its owner, but for the rows that this has already, and returns the update's rows to those
who hold them: with W processes that hold shares, (W - 1) / W of the matrices' bytes each way, of all together;
where every process holds everything, nothing is sent there, and each receives what the others own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from runtime.precision import Shard
from runtime.world import World


class Spread:
    """The owner of every matrix, the same in all processes: the largest first, each to the one with the least work."""

    def __init__(self, shards: Sequence[Shard], costs: Sequence[int], world: World):
        """costs: of the matrices, in whatever unit."""
        self.world = world
        self.shards = {shard.local: shard for shard in shards}
        self.owners = dict(zip(self.shards, _owners(costs, world.size), strict=True))

    def __call__(
        self,
        parameters: Sequence[nn.Parameter],
        given: Sequence[Tensor],
        make: Callable[[list[nn.Parameter], list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """given: of each parameter, the rows that this process has of a matrix of its shape. make(parameters, whole
        matrices) -> as many of equal shape; called with those that this process owns. Returns the rows of what was
        made, of all parameters, that this process has of them."""
        owned = [[i for i, p in enumerate(parameters) if self.owners[p] == rank] for rank in range(self.world.size)]
        mine = owned[self.world.rank]
        whole = self._at_owner(parameters, given, owned, mine)
        made = make([parameters[i] for i in mine], whole)
        outgoing = []
        for rank in range(self.world.size):
            rows = [matrix[self.shards[parameters[i]].rows(rank)] for i, matrix in zip(mine, made, strict=True)]
            outgoing.append(_joined(rows, given[0]))
        sizes = [sum(given[i].numel() for i in of_rank) for of_rank in owned]
        returned: list[Tensor | None] = [None] * len(given)
        for of_rank, flat in zip(owned, self.world.exchanged(outgoing, sizes), strict=True):
            pieces = flat.split([given[i].numel() for i in of_rank])
            for i, piece in zip(of_rank, pieces, strict=True):
                returned[i] = piece.view_as(given[i])
        return returned

    def _at_owner(
        self, parameters: Sequence[nn.Parameter], given: Sequence[Tensor], owned: list[list[int]], mine: list[int]
    ) -> list[Tensor]:
        """The matrices that this process owns, whole."""
        if all(self.shards[parameter].is_whole for parameter in parameters):
            return [given[i] for i in mine]
        outgoing = [_joined([given[i] for i in of_rank], given[0]) for of_rank in owned]
        shapes = [[self._shape_of_rows(parameters[i], rank) for i in mine] for rank in range(self.world.size)]
        sizes = [sum(map(torch.Size.numel, of_rank)) for of_rank in shapes]
        came = [
            [piece.view(shape) for piece, shape in zip(flat.split(list(map(torch.Size.numel, of))), of, strict=True)]
            for flat, of in zip(self.world.exchanged(outgoing, sizes), shapes, strict=True)
        ]
        return [torch.cat(pieces) for pieces in zip(*came, strict=True)]

    def _shape_of_rows(self, parameter: nn.Parameter, rank: int) -> torch.Size:
        shard = self.shards[parameter]
        rows = shard.rows(rank)
        return torch.Size((rows.stop - rows.start, *shard.shape[1:]))


def _owners(costs: Sequence[int], ranks: int) -> list[int]:
    work, owners = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (work[rank], rank))
        work[owners[i]] += costs[i]
    return owners


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """All numbers of the pieces, as a vector."""
    return torch.cat([piece.flatten() for piece in pieces]) if pieces else like.new_empty(0)
