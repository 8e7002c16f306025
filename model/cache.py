"""KV caches: what decoding stores of earlier tokens, in arrays indexed by position."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.mask import Pattern


class CacheView(NamedTuple):
    """The cached columns (keys and values, or latents) that queries attend to, and the position of each row."""

    columns: tuple[Tensor, ...]  # (B, S, ...) each
    positions: Tensor  # (B, S) or (1, S); negative for an empty row


class Cache(ABC):
    """One layer's KV cache: named columns, each an array with one row per position. Row 0 is spare: writes to negative
    positions (padding) land there, and it is never read. The row of a position follows by arithmetic, so there is no
    length counter: stale and unfilled rows have positions that no mask shows."""

    def __init__(self, batch_size: int, rows: int, columns: Mapping[str, tuple[int, ...]], like: Tensor):
        """columns: name -> shape of one row; dtype and device are those of `like`."""
        self.columns = {name: like.new_zeros(batch_size, rows + 1, *shape) for name, shape in columns.items()}
        self.sequences = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)

    @property
    def rows(self) -> int:
        """Number of rows, without the spare one."""
        return next(iter(self.columns.values())).shape[1] - 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one row of one sequence takes in all columns, counted from the tensors."""
        return sum(column[0, 0].nbytes for column in self.columns.values())

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Number of positions that fit before the cache must grow."""

    @abstractmethod
    def write(self, positions: Tensor, **fresh: Tensor) -> None:
        """Store each fresh (B, T, *shape) at positions (B, T) or (1, T), which are below the capacity."""

    @abstractmethod
    def extend(self, positions: Tensor, kv_len: int | None, **fresh: Tensor) -> CacheView:
        """Write, and return all rows that these positions may see: those of the first `kv_len` positions, if the caller
        knows that there are no others."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions; cached rows stay."""

    def _put(self, rows: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Store fresh values in rows (B, T) or (1, T); -1 is the spare one."""
        for name, value in fresh.items():
            self.columns[name][self.sequences, rows + 1] = value

    def _read(self, rows: int) -> tuple[Tensor, ...]:
        """Return the first rows of every column, (B, rows, *shape); views, not copies."""
        return tuple(column[:, 1 : 1 + rows] for column in self.columns.values())

    def _resize(self, rows: int) -> None:
        old_rows = self.rows
        for name, column in self.columns.items():
            self.columns[name] = column.new_zeros(column.shape[0], rows + 1, *column.shape[2:])
            self.columns[name][:, : old_rows + 1] = column


class FullCache(Cache):
    """A KV cache that stores every position p, in row p. A query at p sees rows <= p."""

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
    """A rolling KV cache for sliding windows, whose memory does not grow with the text. It stores the latest `window`
    positions, and always the first `num_global` ones (global tokens): position p >= num_global is in row
    num_global + (p - num_global) mod window.

    The positions of a sequence must continue where they ended, or begin again at 0: overwritten rows cannot be
    restored. A chunk of queries sees the rows cached before it, copied in front of its own; a single query, the common
    case in decoding, needs no copy.
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
        self.window = window
        self.num_global = num_global

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
        cached = zip(self.columns, self._read(rows), strict=True)
        columns = tuple(torch.cat((column, fresh[name]), 1) for name, column in cached)
        view = CacheView(columns, torch.cat((before, positions.expand(len(self.sequences), -1)), 1))
        self.write(positions, **fresh)
        return view

    def grow(self, capacity: int) -> None:
        self._resize(min(capacity, self.window + self.num_global))

    def _positions(self, last: Tensor, rows: int) -> Tensor:
        """Position stored in each row, (B, rows), when `last` (B, 1) is the latest one written; negative if none is."""
        row = torch.arange(rows, device=last.device)[None]
        latest = last - (last - row) % self.window  # among the positions that share the row
        latest = latest.where(latest >= self.num_global, -1)
        return row.where((row < self.num_global) & (row <= last), latest.where(row >= self.num_global, -1))


def cache_for(
    pattern: Pattern, batch_size: int, capacity: int, columns: Mapping[str, tuple[int, ...]], like: Tensor
) -> Cache:
    """Build the smallest KV cache that holds every key a later query can see under this pattern."""
    if pattern.has_bounded_reach:
        return WindowCache(batch_size, capacity, columns, like, window=pattern.window, num_global=pattern.global_tokens)
    return FullCache(batch_size, capacity, columns, like)
