"""Attention that skips what a pattern hides, on a CPU, forward and backward: a tile of queries at a time meets, in
PyTorch's flash kernel, the keys that one of its queries may see, and no others.

Which these are follows from the pattern, or from where documents begin: one range for a window, several for global
tokens and random blocks, every n-th key for a dilation of n, whose tiles take every n-th query. Several ranges are
copied side by side, and a mask of the tile hides what is left. The backward pass makes copies and wide masks again, so
that memory grows as T.

Letters: B batch, T queries, S keys, H heads, G key heads, D width; t and s are T and S of one tile.
"""

import functools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import Unsupported
from model.kernels.base import Attended, Case, How, Kernel, announce, check_drops_nothing
from model.kernels.online import tiles
from model.kernels.sdpa import CPU_FLASH, CPU_FLASH_BACKWARD, SDPA, widened, with_gradient_of_lse
from model.mask import Mask, Pattern, made_once

UNDIVIDED = SDPA()  # runs what has nothing to skip
QUERIES = (64, 128, 256)  # of a tile
# What a tile costs beside its pairs, in queries more: with 64 the flash kernel takes 1.2 to 1.35 times as long for a
# pair as with 256, measured with heads of 64 on 128 to 1,500 keys.
OVERHEAD = 24
MAX_MASK = 2**21  # elements of a tile's mask, for each sequence
MAX_SHARED_KEYS = 1024  # width up to which layers share a tile's mask


class Tile(NamedTuple):
    rows: slice  # of queries; every n-th where the pattern is dilated
    keys: tuple[slice, ...]  # that they may see, in ranges
    lengths: tuple[int, ...]  # of the ranges
    shared: bool  # whether layers share the mask of this tile

    @classmethod
    def of(cls, rows: slice, keys: list[slice]) -> Self:
        lengths = tuple(_length(of) for of in keys)
        return cls(rows, tuple(keys), lengths, sum(lengths) <= MAX_SHARED_KEYS)

    def beginning_at(self, first: int) -> Self:
        """The same without the keys before `first`."""
        clipped = (slice(_next(keys, first), keys.stop, keys.step) for keys in self.keys)
        return Tile.of(self.rows, [keys for keys in clipped if keys.start < keys.stop])

    @property
    def n_queries(self) -> int:
        return _length(self.rows)


class Tiles(Kernel):
    """Flash attention by tiles, on a CPU. The backward pass computes in float32, in which PyTorch's is faster there
    than in bfloat16."""

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type != "cpu":
            raise Unsupported(f"kernel=tiles runs on a CPU, not on {device.type}: kernel=auto or kernel=flex")
        check_drops_nothing("tiles", dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        case = Case.of(q, k, v, mask, how)
        self.check(q.device, case.trains, case.dropout)
        if mask.is_plain_causal or q.shape[1] == 1:
            return UNDIVIDED.run(case, q, k, v, mask, how)
        announce("tiles (flash)", case)
        width = max(case.key_dim, case.v_dim)  # of all, as the flash kernel wants it: see SDPA.run
        q, k = widened(q, width), widened(k, width)
        v = k if how.v_dim is not None else widened(v, width)
        out, lse = _Attention.apply(q, k, v, mask, how.scale, plan(mask))
        return Attended(out if case.v_dim == width else out[..., : case.v_dim], lse if how.lse else None)


def plan(mask: Mask) -> tuple[Tile, ...]:
    """Cut the queries into tiles, of the size that costs least, which shapes and pattern decide."""
    if _tells_documents(mask):
        return made_once(mask.made, ("plan", QUERIES), lambda: _plan_of_documents(mask))
    pattern = mask.pattern_by_index
    return _plan(None if pattern is None else pattern.settings, mask.q_pos.shape[1], mask.k_pos.shape[1], QUERIES)


def _tells_documents(mask: Mask) -> bool:
    """Whether it can be read where documents begin: not from the tensors of a compiler or of a dry run."""
    packed = mask.q_doc is not None and mask.pattern.causal
    return packed and not torch.compiler.is_compiling() and type(mask.q_pos) is Tensor and mask.q_pos.is_cpu


def _plan_of_documents(mask: Mask) -> tuple[Tile, ...]:
    """As `_cheapest`, of tiles that leave out the documents before their own. A tile is of all sequences, and so begins
    with the earliest of theirs."""
    indices = torch.arange(mask.q_pos.shape[1])
    first = (indices - mask.q_pos.clamp(min=0)).amin(0).tolist()  # of each query, where its document begins
    pattern = mask.pattern_by_index
    plans = [_cut(pattern, len(first), len(first), size) for size in QUERIES]
    return _least([tuple(tile.beginning_at(first[tile.rows.start]) for tile in plan) for plan in plans])


def _plan(settings: tuple | None, n_queries: int, n_keys: int, sizes: tuple[int, ...]) -> tuple[Tile, ...]:
    return _cheapest(settings, n_queries, n_keys, sizes)


_plan._dynamo_marked_constant = True  # else torch.compile, which looks past a cache, would trace every tile made


@functools.lru_cache(maxsize=64)
def _cheapest(settings: tuple | None, n_queries: int, n_keys: int, sizes: tuple[int, ...]) -> tuple[Tile, ...]:
    """settings: of the pattern by index; None where all keys may be seen."""
    pattern = None if settings is None else Pattern(*settings)
    return _least([_cut(pattern, n_queries, n_keys, size) for size in sizes])


def _least(plans: list[tuple[Tile, ...]]) -> tuple[Tile, ...]:
    """Of plans, the one of least cost whose masks are not too large."""
    fitting = [plan for plan in plans if all(tile.n_queries * sum(tile.lengths) <= MAX_MASK for tile in plan)]
    return min(fitting or plans[:1], key=_cost)


def _cut(pattern: Pattern | None, n_queries: int, n_keys: int, size: int) -> tuple[Tile, ...]:
    """Tiles of up to `size` queries. Those of a dilated pattern have every n-th query, which see every n-th key."""
    every = slice(0, n_queries)
    if pattern is None:
        return tuple(Tile.of(rows, [slice(0, n_keys)]) for rows in tiles(every, size))
    if pattern.dilation == 1 or pattern.random_blocks:
        return tuple(Tile.of(rows, pattern.spans(rows, n_keys)) for rows in tiles(every, size))
    step = pattern.dilation
    strided = (
        slice(part.start + first, min(part.stop, n_queries), step)
        for part in tiles(every, size * step)
        for first in range(min(step, part.stop - part.start))
    )
    return tuple(Tile.of(rows, pattern.spans(rows, n_keys)) for rows in strided)


def _cost(plan: tuple[Tile, ...]) -> int:
    return sum((tile.n_queries + OVERHEAD) * sum(tile.lengths) for tile in plan)


def _next(span: slice, first: int) -> int:
    """The first of a span's indices that is not below `first`."""
    return span.start if first <= span.start else first + (span.start - first) % (span.step or 1)


def _length(span: slice) -> int:
    return len(range(span.start, span.stop, span.step or 1))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (ctx is as self)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, plan: tuple[Tile, ...]
    ) -> tuple[Tensor, Tensor]:
        """Returns the output (B, T, H, D) and the log-sum-exp (B, T, H), which has a gradient too."""
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for tile in plan:
            given = _queries(q, tile), _keys(k, tile), _keys(v, tile)
            found, of_tile = CPU_FLASH(*given, 0.0, False, attn_mask=_bias(mask, tile, q.dtype), scale=scale)
            out[:, tile.rows], lse[:, tile.rows] = found.transpose(1, 2), of_tile.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.plan = mask, scale, plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Each tile gives its queries their gradients, and adds to those of the keys that it met."""
        *given, lse = ctx.saved_tensors
        d_out = torch.zeros_like(given[0]) if d_out is None else d_out
        dtype, width = given[0].dtype, given[0].shape[-1]
        d_out, q, k, v, out = (x.to(lse.dtype) for x in (d_out, *given))
        if d_lse is not None:
            d_out, q, k, v, out = with_gradient_of_lse(d_out, d_lse, q, k, v, out)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile in ctx.plan:
            do_i, q_i, o_i, lse_i = (_queries(x, tile) for x in (d_out, q, out, lse))
            given = do_i, q_i, _keys(k, tile), _keys(v, tile), o_i, lse_i
            bias = _bias(ctx.mask, tile, q.dtype)
            d_q_i, d_k_i, d_v_i = CPU_FLASH_BACKWARD(*given, 0.0, False, attn_mask=bias, scale=ctx.scale)
            d_q[:, tile.rows] = d_q_i.transpose(1, 2)
            _add(d_k, d_k_i, tile)
            _add(d_v, d_v_i, tile)
        return *(x[..., :width].to(dtype) for x in (d_q, d_k, d_v)), None, None, None


def _queries(x: Tensor, tile: Tile) -> Tensor:
    """(B, T, H, ...) -> (B, H, t, ...): a view, whose last dimension the kernel wants to lie in one piece."""
    rows = x[:, tile.rows].transpose(1, 2)
    return rows if rows.dim() == 3 or rows.stride(-1) == 1 else rows.contiguous()


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """(B, S, G, D) -> (B, G, s, D): a view of one range, or a copy of several."""
    ranges = [x[:, keys] for keys in tile.keys]
    keys = (ranges[0] if len(ranges) == 1 else torch.cat(ranges, 1)).transpose(1, 2)
    return keys if keys.stride(-1) == 1 else keys.contiguous()


def _add(total: Tensor, of_tile: Tensor, tile: Tile) -> None:
    """Add (B, G, s, D) to the rows of total (B, S, G, D) that `_keys` took."""
    parts = of_tile.transpose(1, 2).split(tile.lengths, dim=1)
    for keys, part in zip(tile.keys, parts, strict=True):
        total[:, keys] += part


def _bias(mask: Mask, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The mask of a tile as a term of the scores, 0 or -∞, (B or 1, 1, t, s)."""
    rows = tile.rows

    def make() -> Tensor:
        visible = torch.cat([mask.visible_in(rows, keys) for keys in tile.keys], -1)[:, None]
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))

    # What documents or an indexer hide differs by sequence: to keep it would take memory for each.
    of_all = mask.contiguous and mask.chosen is None
    return made_once(mask.made if tile.shared and of_all else {}, (rows.start, rows.stop, rows.step, dtype), make)
