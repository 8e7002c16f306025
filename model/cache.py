"""What decoding remembers: arrays indexed by position."""

from collections.abc import Mapping

import torch
from torch import Tensor


class FullCache:
    """Keeps every position: what was written for position p is in row p of what `read` gives, for each named column.

    A query at position p sees rows <= p, so unfilled and stale rows hide themselves and no length counter is
    needed. Writes to negative positions (padding) land in a spare row before the first one, which is never read.
    """

    def __init__(self, batch_size: int, capacity: int, columns: Mapping[str, tuple[int, ...]], like: Tensor):
        """columns: shape of one row of each column; `like` lends its dtype and device."""
        self.columns = {name: like.new_zeros(batch_size, capacity + 1, *shape) for name, shape in columns.items()}
        self.sequences = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)

    @property
    def capacity(self) -> int:
        """Positions it can hold; the spare row not counted."""
        return next(iter(self.columns.values())).shape[1] - 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes one position of one sequence takes, counted from the tensors."""
        return sum(column[0, 0].nbytes for column in self.columns.values())

    def write(self, positions: Tensor, **fresh: Tensor) -> None:
        """positions (B, T) or (1, T), each fresh (B, T, *shape). Positions must lie below the capacity."""
        rows = positions.clamp(min=-1) + 1
        for name, value in fresh.items():
            self.columns[name][self.sequences, rows] = value

    def read(self, extent: int | None = None) -> tuple[Tensor, ...]:
        """The first `extent` rows of every column, (B, extent, *shape), in the columns' order; views, not copies."""
        return tuple(column[:, 1 : 1 + self.rows(extent)] for column in self.columns.values())

    def positions(self, extent: int | None = None) -> Tensor:
        """(1, extent): the position each row of `read` stands for."""
        return torch.arange(self.rows(extent), device=self.sequences.device)[None]

    def rows(self, extent: int | None) -> int:
        return self.capacity if extent is None else min(extent, self.capacity)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions; what is held stays."""
        held = self.capacity
        for name, column in self.columns.items():
            self.columns[name] = column.new_zeros(column.shape[0], capacity + 1, *column.shape[2:])
            self.columns[name][:, : held + 1] = column
