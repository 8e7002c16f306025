"""Attention as matrix products and a softmax, with its own backward pass: for short sequences on a CPU, where PyTorch's
fused kernel is slow in bfloat16, especially backward.

Forward and backward in bfloat16 it takes less than half the time of kernel=sdpa at T 64 and 128, and 50 to 60 % at 256
and 512; in float32 it is no faster (benchmarks/README.md).

Letters: B batch, T queries, S keys, G key heads, R = H / G query heads that share one, D width of keys, Dv of values; t
and s are T and S of one tile.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dimensions import Size
from model.kernels.base import Kernel, announce, group_queries
from model.kernels.online import tiles
from model.mask import Mask


class Matmul(Kernel):
    """Computes products in the caller's dtype: scores and probabilities are rounded to it, softmax rows are computed in
    float32. Probabilities are saved for the backward pass, so memory grows as T × S (half of it if causal)."""

    query_tile: Size = 128  # queries computed together; keys that none of them sees are skipped

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        announce("matmul", q, k, v, mask)
        spans = [(rows, mask.span(rows)) for rows in tiles(slice(0, q.shape[1]), self.query_tile)]
        biases = (_bias(mask.visible(rows, keys), q.dtype) for rows, keys in spans)
        return _Attention.apply(q, k, v, scale, dropout, spans, *biases)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dropout: float,
        spans: list[tuple[slice, slice]],
        *biases: Tensor,
    ) -> Tensor:
        """spans: the queries of each tile, and the keys they may see. biases: each tile's mask as a term of the scores,
        (B or 1, t, s)."""
        (batch, _, groups, _), repeats = k.shape, q.shape[2] // k.shape[2]
        out = q.new_empty(*q.shape[:3], v.shape[3])
        saved = []
        k, v = _by_key_head(k, groups), _by_key_head(v, groups)  # (B·G, S, D), (B·G, S, Dv)
        for (rows, keys), bias in zip(spans, biases, strict=True):
            q_i = _by_key_head(q[:, rows], groups)  # (B·G, R·t, D)
            x = bias[:, None, None].expand(batch, groups, repeats, -1, -1).clone(memory_format=torch.contiguous_format)
            x = x.view(*q_i.shape[:2], -1).baddbmm_(q_i, k[:, keys].mT, alpha=scale)
            p = x.softmax(-1)  # (B·G, R·t, s)
            keep = torch.empty_like(p).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
            out[:, rows] = _by_token(_dropped(p, keep) @ v[:, keys], out[:, rows].shape)
            saved += [q_i, p, keep]
        ctx.save_for_backward(k, v, *saved)
        ctx.shape, ctx.groups, ctx.scale, ctx.spans = q.shape, groups, scale, spans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """With X = scale · QKᵀ, P = softmax(X), and M dropout's factors of P:

        dV = (M ∘ P)ᵀ dO      dP = M ∘ dO Vᵀ      dX = P ∘ (dP - rowsum(P ∘ dP))
        dQ = scale · dX K     dK = scale · dXᵀ Q
        """
        k, v, *saved = ctx.saved_tensors
        d_q, d_k, d_v = d_out.new_empty(ctx.shape), torch.zeros_like(k), torch.zeros_like(v)
        for i, (rows, keys) in enumerate(ctx.spans):
            q_i, p, keep = saved[3 * i : 3 * i + 3]
            do_i = _by_key_head(d_out[:, rows], ctx.groups)  # (B·G, R·t, Dv)
            d_v[:, keys].baddbmm_(_dropped(p, keep).mT, do_i)
            d_p = _dropped(do_i @ v[:, keys].mT, keep)
            d_x = torch._softmax_backward_data(d_p, p, -1, p.dtype)  # (B·G, R·t, s)
            d_q[:, rows] = _by_token(d_x @ k[:, keys], d_q[:, rows].shape)
            d_k[:, keys].baddbmm_(d_x.mT, q_i)
        d_k, d_v = (x.unflatten(0, (-1, ctx.groups)).transpose(1, 2) for x in (d_k.mul_(ctx.scale), d_v))
        return d_q.mul_(ctx.scale), d_k, d_v, *[None] * (3 + len(ctx.spans))


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a term of the scores: 0, or -∞ for a hidden key."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _dropped(p: Tensor, keep: Tensor | None) -> Tensor:
    """Apply dropout: keep is 0 or 1 / (1 - dropout) for each weight."""
    return p if keep is None else p * keep


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """(B, t, H, D) -> (B·G, R·t, D): the query heads that share a KV head become rows of one matrix."""
    return group_queries(x, groups).permute(0, 2, 3, 1, 4).reshape(x.shape[0] * groups, -1, x.shape[3])


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of _by_key_head: (B·G, R·t, D) -> (B, t, H, D), which is `shape`."""
    return x.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
