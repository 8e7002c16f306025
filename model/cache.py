"""What decoding remembers: arrays indexed by position."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.mask import Pattern


class CacheView(NamedTuple):
    """What a query may be held against."""

    columns: tuple[Tensor, ...]  # (B, S, ...) each
    positions: Tensor  # (B, S) or (1, S); negative where there is nothing


class Cache(ABC):
    """Named columns, each an array of rows that belong to positions. Row 0 is spare: writes to negative positions
    (padding) land there, and it is never read. Which row a position has is a matter of arithmetic, so there is no
    length counter: stale and unfilled rows hide themselves."""

    def __init__(self, batch_size: int, rows: int, columns: Mapping[str, tuple[int, ...]], like: Tensor):
        """columns: shape of one row of each column; `like` lends its dtype and device."""
        self.columns = {name: like.new_zeros(batch_size, rows + 1, *shape) for name, shape in columns.items()}
        self.sequences = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)

    @property
    def rows(self) -> int:
        """The spare one not counted."""
        return next(iter(self.columns.values())).shape[1] - 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes one row of one sequence takes, counted from the tensors."""
        return sum(column[0, 0].nbytes for column in self.columns.values())

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Positions it can take before it must grow."""

    @abstractmethod
    def write(self, positions: Tensor, **fresh: Tensor) -> None:
        """positions (B, T) or (1, T) below the capacity, each fresh (B, T, *shape)."""

    @abstractmethod
    def extend(self, positions: Tensor, kv_len: int | None, **fresh: Tensor) -> CacheView:
        """Writes, and gives all that these positions may see of what was ever written: of the first `kv_len` positions,
        if the caller knows that there are no others."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions; what is held stays."""

    def _put(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """rows (B, T) or (1, T), -1 for the spare one."""
        for name, value in fresh.items():
            self.columns[name][self.sequences, rows + 1] = value

    def _read(self, rows: int) -> tuple[Tensor, ...]:
        """The first rows of every column, (B, rows, *shape); views, not copies."""
        return tuple(column[:, 1 : 1 + rows] for column in self.columns.values())

    def _resize(self, rows: int) -> None:
        held = self.rows
        for name, column in self.columns.items():
            self.columns[name] = column.new_zeros(column.shape[0], rows + 1, *column.shape[2:])
            self.columns[name][:, : held + 1] = column


class FullCache(Cache):
    """Keeps every position p, in row p. A query at p sees rows <= p."""

    @property
    def capacity(self) -> int:
        return self.rows

    def write(self, positions: Tensor, **fresh: Tensor) -> None:
        self._put(positions.clamp(min=-1), fresh)

    def extend(self, positions: Tensor, kv_len: int | None, **fresh: Tensor) -> CacheView:
        self.write(positions, **fresh)
        rows = self.rows if kv_len is None else min(kv_len, self.rows)
        return CacheView(self._read(rows), torch.arange(rows, device=positions.device)[None])

    def grow(self, capacity: int) -> None:
        self._resize(capacity)


class WindowCache(Cache):
    """Keeps the latest `window` positions, and the first `num_global` ones for ever: position p >= num_global is in row
    num_global + (p - num_global) mod window. Its memory does not grow with the text.

    The positions of a sequence must go on where they ended, or begin again at 0: what a window has dropped cannot be
    had back. Several queries at once see what was held before them beside themselves; a single one, the common case in
    decoding, needs no copy.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        columns: Mapping[str, tuple[int, ...]],
        like: Tensor,
        *,
        window: int,
        num_global: int = 0,
    ):
        super().__init__(batch_size, min(capacity, window + num_global), columns, like)
        self.window, self.num_global = window, num_global

    @property
    def capacity(self) -> int:
        return self.rows if self.rows < self.window + self.num_global else sys.maxsize

    def write(self, positions: Tensor, **fresh: Tensor) -> None:
        last = positions.amax(1, keepdim=True)
        ring = self.num_global + (positions - self.num_global) % self.window
        rows = ring.where((positions >= self.num_global) & (positions > last - self.window), -1)
        self._put(positions.where((positions >= 0) & (positions < self.num_global), rows), fresh)

    def extend(self, positions: Tensor, kv_len: int | None, **fresh: Tensor) -> CacheView:
        rows = self.rows if kv_len is None else min(kv_len, self.rows)
        if positions.shape[1] == 1:
            self.write(positions, **fresh)
            return CacheView(self._read(rows), self._positions(positions, rows))
        first = positions.where(positions >= 0, sys.maxsize).amin(1, keepdim=True)
        before = self._positions(first - 1, rows).expand(len(self.sequences), -1)
        held = zip(self.columns, self._read(rows), strict=True)
        columns = tuple(torch.cat((column, fresh[name]), 1) for name, column in held)
        keys = CacheView(columns, torch.cat((before, positions.expand(len(self.sequences), -1)), 1))
        self.write(positions, **fresh)
        return keys

    def grow(self, capacity: int) -> None:
        self._resize(min(capacity, self.window + self.num_global))

    def _positions(self, last: Tensor, rows: int) -> Tensor:
        """(B, rows): the position each row holds, once `last` (B, 1) is the latest one written; negative for none."""
        row = torch.arange(rows, device=last.device)[None]
        latest = last - (last - row) % self.window  # of those that share the row
        latest = latest.where(latest >= self.num_global, -1)
        return row.where((row < self.num_global) & (row <= last), latest.where(row >= self.num_global, -1))


def cache_for(
    pattern: Pattern, batch_size: int, capacity: int, columns: Mapping[str, tuple[int, ...]], like: Tensor
) -> Cache:
    """The smallest cache from which every later query of this pattern can be answered."""
    if pattern.has_bounded_reach:
        return WindowCache(batch_size, capacity, columns, like, window=pattern.window, num_global=pattern.global_tokens)
    return FullCache(batch_size, capacity, columns, like)
