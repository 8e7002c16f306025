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
from model.kernels.base import Attended, Case, How, Kernel, announce, group_queries
from model.kernels.online import tiles
from model.mask import Mask
from model.upcast import upcast, upcast_dtype


class Matmul(Kernel):
    """Computes products in the caller's dtype: scores and probabilities are rounded to it, softmax rows are computed in
    float32. Probabilities are saved for the backward pass, so memory grows as T × S (half of it if causal)."""

    query_tile: Size = 128  # queries computed together; keys that none of them sees are skipped

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        announce("matmul", Case.of(q, k, v, mask, how))
        spans = [(rows, mask.span(rows)) for rows in tiles(slice(0, q.shape[1]), self.query_tile)]
        biases = (mask.bias(rows, keys, q.dtype) for rows, keys in spans)
        return Attended(*_Attention.apply(q, k, how.values(k, v), how, spans, *biases))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: How, spans: list[tuple[slice, slice]], *biases: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """spans: the queries of each tile, and the keys they may see. biases: each tile's mask as a term of the scores,
        (B or 1, t, s). Returns the output, and the log-sum-exp if wanted."""
        (batch, _, groups, _), repeats = k.shape, q.shape[2] // k.shape[2]
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(*q.shape[:3], 1, dtype=upcast_dtype(q)) if how.lse else None
        saved = []
        k, v = _by_key_head(k, groups), _by_key_head(v, groups)  # (B·G, S, D), (B·G, S, Dv)
        for (rows, keys), bias in zip(spans, biases, strict=True):
            q_i = _by_key_head(q[:, rows], groups)  # (B·G, R·t, D)
            x = bias[:, None, None].expand(batch, groups, repeats, -1, -1).clone(memory_format=torch.contiguous_format)
            x = x.view(*q_i.shape[:2], -1).baddbmm_(q_i, k[:, keys].mT, alpha=how.scale)
            p = x.softmax(-1)  # (B·G, R·t, s)
            keep = torch.empty_like(p).bernoulli_(1 - how.dropout).div_(1 - how.dropout) if how.dropout else None
            out[:, rows] = _by_token(_dropped(p, keep) @ v[:, keys], out[:, rows].shape)
            if how.lse:
                lse[:, rows] = _by_token(upcast(x).logsumexp(-1, keepdim=True), lse[:, rows].shape)
            saved += [q_i, p, keep]
        ctx.save_for_backward(k, v, *saved)
        ctx.shape, ctx.groups, ctx.scale, ctx.spans = q.shape, groups, how.scale, spans
        ctx.set_materialize_grads(False)
        return out, None if lse is None else lse.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """With X = scale · QKᵀ, P = softmax(X), M dropout's factors of P, and L the log-sum-exp of X:

        dV = (M ∘ P)ᵀ dO      dP = M ∘ dO Vᵀ      dX = P ∘ (dP - rowsum(P ∘ dP) + dL)
        dQ = scale · dX K     dK = scale · dXᵀ Q
        """
        k, v, *saved = ctx.saved_tensors
        if d_out is None:
            d_out = v.new_zeros(*ctx.shape[:3], v.shape[-1])
        d_q, d_k, d_v = d_out.new_empty(ctx.shape), torch.zeros_like(k), torch.zeros_like(v)
        for i, (rows, keys) in enumerate(ctx.spans):
            q_i, p, keep = saved[3 * i : 3 * i + 3]
            do_i = _by_key_head(d_out[:, rows], ctx.groups)  # (B·G, R·t, Dv)
            d_v[:, keys].baddbmm_(_dropped(p, keep).mT, do_i)
            d_p = _dropped(do_i @ v[:, keys].mT, keep)
            d_x = torch._softmax_backward_data(d_p, p, -1, p.dtype)  # (B·G, R·t, s)
            if d_lse is not None:
                d_x = torch.addcmul(d_x, p, _by_key_head(d_lse[:, rows, :, None], ctx.groups).to(p.dtype))
            d_q[:, rows] = _by_token(d_x @ k[:, keys], d_q[:, rows].shape)
            d_k[:, keys].baddbmm_(d_x.mT, q_i)
        d_k, d_v = (x.unflatten(0, (-1, ctx.groups)).transpose(1, 2) for x in (d_k.mul_(ctx.scale), d_v))
        return d_q.mul_(ctx.scale), d_k, d_v, *[None] * (2 + len(ctx.spans))


def _dropped(p: Tensor, keep: Tensor | None) -> Tensor:
    """Apply dropout: keep is 0 or 1 / (1 - dropout) for each weight."""
    return p if keep is None else p * keep


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """(B, t, H, D) -> (B·G, R·t, D): the query heads that share a KV head become rows of one matrix."""
    return group_queries(x, groups).permute(0, 2, 3, 1, 4).reshape(x.shape[0] * groups, -1, x.shape[3])


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of _by_key_head: (B·G, R·t, D) -> (B, t, H, D), which is `shape`."""
    return x.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
