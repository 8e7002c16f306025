"""KV caches: what decoding stores of earlier tokens, in arrays indexed by position."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.mask import Pattern, made_once

SLACK = 16  # positions that a window's cache holds beyond the window, so that it can rewind


class CacheView(NamedTuple):
    """The columns (keys and values, or latents) that queries attend to, and the position of each row."""

    columns: tuple[Tensor, ...]  # (B, S, ...) each
    positions: Tensor  # (B, S) or (1, S); negative for an empty row


class Fresh(Protocol):
    """Where the tokens of a forward pass stand, as model.placement.Placement says it."""

    positions: Tensor  # (B, T) or (1, T); negative is padding
    is_contiguous: bool  # from 0 on, with nothing but padding behind, and nothing was cached before
    kv_len: int | None  # cache rows that may be visible; None is all
    made: dict[Any, Any]  # what caches alike share in this pass: which rows they write, and whose these are


class Cache(ABC):
    """One layer's KV cache. The caller owns it; attention updates it in place."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Number of positions that fit before the cache must grow."""

    @property
    @abstractmethod
    def max_rewind(self) -> int:
        """Number of the latest positions that `rewind` may take back; at least 16."""

    @property
    @abstractmethod
    def bytes_per_sequence(self) -> int:
        """Bytes that one sequence takes, counted from the tensors."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes that each position cached takes of one sequence; 0 if they do not grow with the text."""

    @abstractmethod
    def update(self, at: Fresh, **fresh: Tensor) -> CacheView:
        """Store fresh (B, T, *shape), by name of the column, at the positions of `at`, which are below the capacity.
        Returns all rows that these positions may see, their own included; in a contiguous prefill, where nothing was
        cached before, these are the fresh tensors themselves."""

    @abstractmethod
    def read(self, lengths: Tensor) -> CacheView:
        """Return what is cached of the first `lengths` (B,) positions of each sequence. Every other row has a negative
        position."""

    @abstractmethod
    def rewind(self, lengths: Tensor) -> None:
        """Forget all but the first `lengths` (B,) positions of each sequence: at most the latest `max_rewind`. The next
        update begins there."""

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Let one sequence of the batch continue another: copy all that is cached of it."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions; cached ones stay."""


class ColumnCache(Cache):
    """Named columns, each an array with one row per position. Row 0 is spare: writes to negative positions (padding)
    land there, and it is never read. The row of a position follows by arithmetic, so there is no length counter: stale
    and unfilled rows have positions that no mask shows, and rewinding needs no work."""

    def __init__(self, batch_size: int, rows: int, columns: Mapping[str, tuple[int, ...]], like: Tensor):
        """columns: name -> shape of one row; dtype and device are those of `like`."""
        self.columns = {name: _column(like, batch_size, rows + 1, shape) for name, shape in columns.items()}
        self.sequences = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)

    @property
    def rows(self) -> int:
        """Number of rows, without the spare one."""
        return next(iter(self.columns.values())).shape[1] - 1

    @property
    def bytes_per_token(self) -> int:
        return sum(column[0, 0].nbytes for column in self.columns.values())

    @property
    def bytes_per_sequence(self) -> int:
        return self.rows * self.bytes_per_token

    def rewind(self, lengths: Tensor) -> None:
        pass  # what comes next overwrites what no mask shows until then

    def copy_row(self, source: int, target: int) -> None:
        for column in self.columns.values():
            column[target] = column[source]

    def by_head(self, name: str) -> Tensor:
        """A column as it lies in memory, (B, heads, 1 + rows, ...): row 0 is the spare one."""
        return self.columns[name].transpose(1, 2)

    def _put(self, index: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Store fresh values at an index (B, T) or (1, T) of the columns: 1 + row, or 0 for the spare one."""
        for name, value in fresh.items():
            self.columns[name][self.sequences, index] = value

    def _first(self, rows: int | None) -> tuple[Tensor, ...]:
        """The first rows of every column, (B, rows, *shape), or all; views, not copies."""
        stop = None if rows is None else 1 + rows
        return tuple(column[:, 1:stop] for column in self.columns.values())

    def _resize(self, rows: int) -> None:
        old_rows = self.rows
        for name, column in self.columns.items():
            self.columns[name] = _column(column, column.shape[0], rows + 1, column.shape[2:])
            self.columns[name][:, : old_rows + 1] = column


def _column(like: Tensor, batch_size: int, rows: int, shape: tuple[int, ...]) -> Tensor:
    """Zeros (B, rows, *shape). What has heads lies a head after the other in memory: kernels read each in one run."""
    if len(shape) < 2:
        return like.new_zeros(batch_size, rows, *shape)
    heads, *rest = shape
    return like.new_zeros(batch_size, heads, rows, *rest).transpose(1, 2)


class FullCache(ColumnCache):
    """A KV cache that stores every position p, in row p. A query at p sees rows <= p."""

    max_rewind = sys.maxsize

    @property
    def capacity(self) -> int:
        return self.rows

    def update(self, at: Fresh, **fresh: Tensor) -> CacheView:
        self._put(made_once(at.made, FullCache, lambda: at.positions.clamp(min=-1) + 1), fresh)
        if at.is_contiguous:
            return CacheView(tuple(fresh.values()), at.positions)
        rows = self.rows if at.kv_len is None else min(at.kv_len, self.rows)
        positions = made_once(at.made, (FullCache, rows), lambda: torch.arange(rows, device=at.positions.device)[None])
        return CacheView(self._first(rows), positions)

    def read(self, lengths: Tensor) -> CacheView:
        row = torch.arange(self.rows, device=lengths.device)[None]
        return CacheView(self._first(None), row.where(row < lengths[:, None], -1))

    def grow(self, capacity: int) -> None:
        self._resize(capacity)


class WindowCache(ColumnCache):
    """A rolling KV cache for sliding windows, whose memory does not grow with the text. It stores the latest
    `window + SLACK` positions, a ring, and always the first `num_global` ones (global tokens): position
    p >= num_global is in row num_global + (p - num_global) mod (window + SLACK).

    The positions of a sequence must continue where they ended, or at most SLACK before, or begin again at 0: what was
    overwritten cannot be restored. After rewinding by n <= SLACK, the rows of the n positions taken back count as those
    that were there before them, which are out of the window. A chunk of queries sees the rows cached before it, copied
    in front of its own; a single query, the common case in decoding, needs no copy.
    """

    max_rewind = SLACK

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
        self.num_global = num_global
        self.ring = window + SLACK
        super().__init__(batch_size, min(capacity, num_global + self.ring), columns, like)

    @property
    def capacity(self) -> int:
        return self.rows if self.rows < self.num_global + self.ring else sys.maxsize

    def update(self, at: Fresh, **fresh: Tensor) -> CacheView:
        index = made_once(at.made, (self.num_global, self.ring), lambda: self._index(at.positions))
        if at.is_contiguous:
            self._put(index, fresh)
            return CacheView(tuple(fresh.values()), at.positions)
        rows = self.rows if at.kv_len is None else min(at.kv_len, self.rows)
        columns = self._first(rows)
        if at.positions.shape[1] == 1:
            positions_of = self._positions_of_rows
        else:
            positions_of = self._positions_before
            columns = tuple(torch.cat((old, fresh[name]), 1) for name, old in zip(self.columns, columns, strict=True))
        self._put(index, fresh)
        key = (self.num_global, self.ring, rows)
        return CacheView(columns, made_once(at.made, key, lambda: positions_of(at.positions, rows)))

    def read(self, lengths: Tensor) -> CacheView:
        return CacheView(self._first(None), self._positions_of_rows(lengths[:, None] - 1, self.rows))

    def grow(self, capacity: int) -> None:
        self._resize(min(capacity, self.num_global + self.ring))

    def _index(self, positions: Tensor) -> Tensor:
        """Index of the columns at which tokens at these positions are stored, (B, T); 0 for those that are not."""
        last = positions.amax(1, keepdim=True)
        ring = self.num_global + (positions - self.num_global) % self.ring
        rows = ring.where((positions >= self.num_global) & (positions > last - self.ring), -1)
        return positions.where((positions >= 0) & (positions < self.num_global), rows) + 1

    def _positions_of_rows(self, last: Tensor, rows: int) -> Tensor:
        """The position in each row when `last` (B, 1) is the latest one; negative for none."""
        row = torch.arange(rows, device=last.device)[None]
        latest = last - (last - row) % self.ring  # among the positions that share the row
        latest = latest.where(latest >= self.num_global, -1)
        return row.where((row < self.num_global) & (row <= last), latest.where(row >= self.num_global, -1))

    def _positions_before(self, positions: Tensor, rows: int) -> Tensor:
        """The position of each row before tokens at these positions came, and then theirs, (B, rows + T)."""
        first = positions.where(positions >= 0, sys.maxsize).amin(1, keepdim=True)
        parts = self._positions_of_rows(first - 1, rows), positions
        return torch.cat([x.expand(len(self.sequences), -1) for x in parts], 1)


def cache_for(
    pattern: Pattern, batch_size: int, capacity: int, columns: Mapping[str, tuple[int, ...]], like: Tensor
) -> Cache:
    """Build the smallest KV cache that holds every key a later query can see under this pattern."""
    if pattern.has_bounded_reach:
        return WindowCache(batch_size, capacity, columns, like, window=pattern.window, num_global=pattern.global_tokens)
    return FullCache(batch_size, capacity, columns, like)
