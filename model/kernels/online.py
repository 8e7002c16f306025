"""FlashAttention (online softmax) written out in PyTorch: the computation of the fused kernels, in their order.

A softmax needs its whole row: the largest score, not to overflow, and the sum of all. Both can be updated as one goes
through the scores, a tile of keys at a time (Milakov & Gimelshein 2018, arXiv:1805.02867): when a tile brings a larger
maximum, all that was summed under the old one shrinks by e^(m_old - m_new). The output is such a sum too, so neither
the scores nor the probabilities, which are T × S, ever exist at once (FlashAttention: Dao et al. 2022,
arXiv:2205.14135). This follows FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2): the output is
divided once, at the end, and of the softmax only L = log Σ e^x is saved, from which the backward pass recomputes each
tile of probabilities, P = e^(x - L).

Slower than kernel=sdpa, which does the same in fast memory. Letters: B batch, T queries, S keys, G key heads, R = H / G
query heads that share one, D width of keys, Dv of values; t and s are T and S of one tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dimensions import Size
from model.kernels.base import Attended, Case, How, Kernel, announce, check_drops_nothing, group_queries
from model.mask import Mask
from model.upcast import upcast, upcast_dtype

LOWEST = torch.finfo(torch.float32).min  # initial maximum; -∞ would give NaN in a tile where a row sees no key


class Online(Kernel):
    """FlashAttention in float32. Memory grows as T + S, forward and backward."""

    query_tile: Size = 128
    key_tile: Size = 128

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        check_drops_nothing("online", dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        check_drops_nothing("online", how.dropout > 0)
        announce("online", Case.of(q, k, v, mask, how))
        out, lse = _Attention.apply(q, k, how.values(k, v), mask, how.scale, (self.query_tile, self.key_tile))
        return Attended(out, lse if how.lse else None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (ctx is as self)
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, tile_sizes: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """tile_sizes: of queries, and of keys. Returns the output and L, which has a gradient too."""
        query_tile, key_tile = tile_sizes
        out = q.new_empty(*q.shape[:3], v.shape[3])  # (B, T, H, Dv)
        log_sum_exp = q.new_empty(q.shape[:3], dtype=upcast_dtype(q))  # (B, T, H)
        for rows in tiles(slice(0, q.shape[1]), query_tile):
            q_i = group_queries(q[:, rows], k.shape[2])  # (B, t, G, R, D)
            # (B, t, G, R), the largest score so far
            m = torch.full(q_i.shape[:4], LOWEST, dtype=upcast_dtype(q), device=q.device)
            total = torch.zeros_like(m)  # (B, t, G, R) the l of the papers: Σ e^(x - m)
            o = m.new_zeros(*m.shape, v.shape[3])  # (B, t, G, R, Dv) Σ e^(x - m) v, not divided by it yet
            for keys in tiles(mask.span(rows), key_tile):
                x = scores_of_tile(q_i, k, mask, scale, rows, keys)  # (B, t, G, R, s)
                m_new = torch.maximum(m, x.amax(-1))
                p = (x - m_new[..., None]).exp()  # (B, t, G, R, s)
                shrink = rescale(m, m_new)
                total = total * shrink + p.sum(-1)
                o = o * shrink[..., None] + torch.einsum("btgrs,bsgv->btgrv", p, upcast(v[:, keys]))
                m = m_new
            out[:, rows] = (o / total[..., None]).flatten(2, 3)  # in the caller's dtype
            log_sum_exp[:, rows] = (m + total.log()).flatten(2, 3)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.mask, ctx.scale, ctx.tile_sizes = mask, scale, tile_sizes
        ctx.set_materialize_grads(False)
        return out, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """With P the probabilities and A = QKᵀ:

            dV = Pᵀ dO        dP = dO Vᵀ        dA = scale · P ∘ (dP - D)        dQ = dA K        dK = dAᵀ Q

        where D = rowsum(P ∘ dP) - dL. The first term comes through the sum that a softmax divides by, and is
        rowsum(dO ∘ O): no pass over the keys; the second is the gradient of L itself, as dL/dx = P. FlashAttention-2
        has the loop over keys outside, so that thread blocks need not add to the same dK and dV; here tiles run one
        after another.
        """
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        n_groups, scale = k.shape[2], ctx.scale
        query_tile, key_tile = ctx.tile_sizes
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_q, d_k, d_v = (torch.zeros_like(x, dtype=upcast_dtype(x)) for x in (q, k, v))
        for rows in tiles(slice(0, q.shape[1]), query_tile):
            # all are views: adding to d_q_i adds to d_q
            q_i, do_i, o_i, d_q_i = (group_queries(x[:, rows], n_groups) for x in (q, d_out, out, d_q))
            do_i = upcast(do_i)  # (B, t, G, R, Dv)
            lse_i = log_sum_exp[:, rows].unflatten(2, (n_groups, -1))  # (B, t, G, R)
            d_i = (do_i * o_i).sum(-1)  # (B, t, G, R)
            if d_lse is not None:
                d_i = d_i - d_lse[:, rows].unflatten(2, (n_groups, -1))
            for keys in tiles(ctx.mask.span(rows), key_tile):
                x = scores_of_tile(q_i, k, ctx.mask, scale, rows, keys)
                p = (x - lse_i[..., None]).exp()  # (B, t, G, R, s), which sums to 1 over all tiles
                d_v[:, keys] += torch.einsum("btgrs,btgrv->bsgv", p, do_i)
                d_p = torch.einsum("btgrv,bsgv->btgrs", do_i, upcast(v[:, keys]))
                d_a = scale * p * (d_p - d_i[..., None])  # (B, t, G, R, s)
                d_q_i += torch.einsum("btgrs,bsgd->btgrd", d_a, upcast(k[:, keys]))
                d_k[:, keys] += torch.einsum("btgrs,btgrd->bsgd", d_a, upcast(q_i))
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def tiles(span: slice, size: int) -> Iterator[slice]:
    """Cut a span into pieces of `size`; the last may be shorter."""
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def scores_of_tile(q_i: Tensor, k: Tensor, mask: Mask, scale: float, rows: slice, keys: slice) -> Tensor:
    """Masked scores of one tile, x = scale · q kᵀ or -∞: q_i (B, t, G, R, D), the queries in `rows`, with the keys in
    `keys` of k (B, S, G, D) -> (B, t, G, R, s). KV heads are not repeated for the query heads that share them."""
    x = scale * torch.einsum("btgrd,bsgd->btgrs", upcast(q_i), upcast(k[:, keys]))
    return x.masked_fill(~mask.visible_in(rows, keys)[:, :, None, None], float("-inf"))


def rescale(m: Tensor, m_new: Tensor) -> Tensor:
    """Factor e^(m - m_new) that turns a sum relative to the maximum m into one relative to m_new >= m. (Several texts
    misprint its sign, which overflows.)"""
    return (m - m_new).exp()
