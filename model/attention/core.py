"""AttentionCore: what every attention does between its projections and its output matrix."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.cache import Cache, cache_for
from model.context import Context
from model.kernels.base import How, Kernel
from model.mask import CAUSAL, Mask, Pattern
from model.positions import PositionBias
from model.stats import collect_stats

SPAN = 4096  # keys that a prefill makes from what is cached at one time


class Heads(NamedTuple):
    """What the heads of an attention return."""

    out: Tensor  # (B, T, H, v)
    aux: dict[str, Tensor]  # auxiliary outputs by name
    carried: Any = None  # for the layers above, as in a value residual; None hands on what came from those below


class AttentionCore:
    """Attends: updates the KV cache, masks by position, adds the position bias, runs the kernel with dropout, and
    collects statistics. It has no weights; what a call may find ready is made at construction."""

    def __init__(self, kernel: Kernel, pattern: Pattern, scale: float, dropout: float, add_position_bias: PositionBias):
        self.attend = kernel
        self.pattern = pattern
        self.scale = scale
        self.dropout = dropout
        self.add_position_bias = add_position_bias

    def __call__(
        self,
        q: Tensor,
        fresh: Mapping[str, Tensor],
        ctx: Context,
        cache: Cache | None,
        keys_and_values: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        v_dim: int | None = None,
    ) -> Heads:
        """q (B, T, H, D) -> output of the heads (B, T, H, Dv), and auxiliary outputs.

        fresh: the columns (B, T, ...) that these tokens cache. keys_and_values turns the columns of all tokens seen
        (B, S, ...) into k (B, S, G, D) and v (B, S, G, Dv); unset, they are these. v_dim: the values are the first
        columns of the keys.
        """
        columns, mask = self.update(fresh, ctx, cache)
        if keys_and_values is not None and self._wants_spans(q, mask, ctx):
            return self._in_spans(q, columns, mask, keys_and_values, v_dim)
        k, v = columns if keys_and_values is None else keys_and_values(*columns)
        return self.attend_to(q, k, v, mask, ctx, v_dim)

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, ctx: Context, v_dim: int | None = None
    ) -> Heads:
        """Run the kernel: q (B, T, H, D), k (B, S, G, D) and v (B, S, G, Dv) -> output of the heads (B, T, H, Dv), and
        auxiliary outputs."""
        q, k, row_offset = self.add_position_bias(q, k, mask, self.scale)
        how = How(self.scale, ctx.dropped(self.dropout), v_dim=v_dim)
        out = self.attend(q, k, v, mask, how).out
        return Heads(out, collect_stats(ctx.collect, q, k, mask, self.scale, row_offset) if ctx.collect else {})

    def _wants_spans(self, q: Tensor, mask: Mask, ctx: Context) -> bool:
        """Whether keys and values of all tokens would take too much memory at one time: in the later tiles of a long
        prefill."""
        long, inference = mask.k_pos.shape[1] > SPAN and q.shape[1] > 1, not (torch.is_grad_enabled() or ctx.collect)
        sees_all = mask.pattern == CAUSAL and not mask.contiguous
        return long and inference and sees_all and q.is_cpu and self.attend.gives_lse("cpu")

    def _in_spans(
        self,
        q: Tensor,
        columns: tuple[Tensor, ...],
        mask: Mask,
        keys_and_values: Callable[..., tuple[Tensor, Tensor | None]],
        v_dim: int | None,
    ) -> Heads:
        """Attend to a span of keys after the other. The softmax over all is the mean of those over each, weighted by
        their sums, e^lse (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
        how = How(self.scale, lse=True, v_dim=v_dim)
        out = lse = None
        for stop in range(mask.k_pos.shape[1], 0, -SPAN):
            keys = slice(max(0, stop - SPAN), stop)
            k, v = keys_and_values(*(column[:, keys] for column in columns))
            part = Mask(mask.q_pos, mask.k_pos[:, keys], False, mask.pattern)
            biased_q, k, _ = self.add_position_bias(q, k, part, self.scale)
            found, found_lse = self.attend(biased_q, k, v, part, how)
            nothing = ((mask.q_pos >= 0) & (mask.q_pos < keys.start))[..., None]  # of this span, seen by a query
            found_lse = found_lse.masked_fill(nothing, float("-inf"))  # kernels differ in what they return there
            if out is None:
                out, lse = found, found_lse
                continue
            share = torch.sigmoid(found_lse - lse).masked_fill(nothing, 0)  # of this span, in the sum of all
            out, lse = out.lerp(found, share[..., None].to(out.dtype)), torch.logaddexp(lse, found_lse)
        return Heads(out, {})

    def make_cache(self, batch_size: int, capacity: int, columns: Mapping[str, tuple[int, ...]], like: Tensor) -> Cache:
        """Create an empty KV cache of these columns, name -> shape of one row, which holds what the pattern shows."""
        return cache_for(self.pattern, batch_size, capacity, columns, like)

    def update(self, fresh: Mapping[str, Tensor], ctx: Context, cache: Cache | None) -> tuple[tuple[Tensor, ...], Mask]:
        """Cache the fresh columns, if there is a cache; return those to attend to, and their mask."""
        if cache is None:
            return tuple(fresh.values()), ctx.mask(self.pattern, None)
        view = cache.update(ctx.at, **fresh)
        return view.columns, ctx.mask(self.pattern, view)
