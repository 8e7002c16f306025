"""Absorbed MLA for one token of every row on a CPU, in few operations: see model/flat_step.py."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.latent import LatentProjections
from model.cache import Cache
from model.flat_step import FlatAttention, Now
from model.kernels.sdpa import attend_to_all
from model.linear import Joined, Linear
from model.norm import RMS_EPS, rms_normer

Core = Callable[[Tensor, Tensor, Now], Tensor]  # (q (B, H, c + r), the new row (B, c + r), now) -> (B, H, c)


def flat_absorbed(attention: LatentProjections, joined: Joined, cache: Cache) -> FlatAttention:
    """MLA._absorbed, by the letters of model/attention/mla.py; of whole keys normed together, or of keys that are not
    normed. attention: an MLA."""
    rows = cache.by_head("latent_and_k_rope")[:, 0]  # (B, 1 + S, c + r)
    batch, c, n, n_heads = len(rows), attention.rank, attention.nope_dim, attention.n_heads
    project, output = joined.multiplier(batch), attention.o_proj.multiplier(batch)
    queries = _queries(attention, batch)
    kv_norm = rms_normer(attention.kv_norm.weight)
    w_uk, w_uv = attention.up_per_head()
    w_uk, w_uv = w_uk.detach().contiguous(), w_uv.detach().mT.contiguous()  # (H, n, c), (H, c, v)
    attend = _normed_core(attention, w_uk, rows, cache) if attention.whole_keys else _plain_core(attention, rows)

    def run(x: Tensor, residual: Tensor, now: Now) -> Tensor:
        q, down = project(x, None).split(joined.sizes, -1)
        q = queries(q)  # (B, H, n + r)
        rotating = torch.cat((q[..., n:], down[:, None, c:]), 1)  # of the heads, and of the key
        rotated = attention.rope.rotate(rotating, now.rotary[attention.rope])
        row = rows[:, now.row].squeeze(1)
        row[:, :c].copy_(kv_norm(down[:, :c]))
        row[:, c:].copy_(rotated[:, n_heads])
        moved = torch.bmm(q[..., :n].transpose(0, 1), w_uk).transpose(0, 1)
        heads = attend(torch.cat((moved, rotated[:, :n_heads]), -1), row, now)  # (B, H, c)
        values = torch.bmm(heads.transpose(0, 1), w_uv)  # (H, B, v)
        return output(values.transpose(0, 1).reshape(batch, -1), residual)

    return run


def _queries(attention: LatentProjections, batch: int) -> Callable[[Tensor], Tensor]:
    """From what the first query matrix gives (B, ...) to queries (B, H, n + r), normed, times the scale where the norm
    has a weight to take it."""
    down_norm = up = norm = None
    if not isinstance(attention.q_proj, Linear):
        down_norm, up = rms_normer(attention.q_proj.norm.weight), attention.q_proj.up.multiplier(batch)
    if attention.whole_keys:
        norm = rms_normer(attention.q_norm.weight * attention.core.scale)

    def queries(q: Tensor) -> Tensor:
        if up is not None:
            q = up(down_norm(q), None)
        q = q.view(batch, attention.n_heads, -1)
        return q if norm is None else norm(q)

    return queries


def _plain_core(attention: LatentProjections, rows: Tensor) -> Core:
    """The rows are keys and values of one head."""

    def attend(q: Tensor, row: Tensor, now: Now) -> Tensor:
        keys = rows[:, None, now.seen]
        return attend_to_all(q[:, None], keys, keys, attention.core.scale)[:, 0, :, : attention.rank]

    return attend


def _normed_core(attention: LatentProjections, w_uk: Tensor, rows: Tensor, cache: Cache) -> Core:
    """Keys are the rows times their inverse root mean square. In float32 two products, which leaves the rows as they
    are and scales scores; in lower precisions, whose products are slow or round the scores, the fused kernel."""
    inverse = cache.by_head("inverse_rms")[:, 0]  # (B, 1 + S, 1)
    n_heads, n, c = w_uk.shape
    r = rows.shape[-1] - c
    count = n_heads * (n + r)  # numbers in the keys of all heads
    # A row times this has the length of the keys of all heads: those of W_uk, and the rope key once for each head.
    lengthen = torch.zeros(c + r, n_heads * n + r)
    lengthen[:c, : n_heads * n] = w_uk.flatten(0, 1).mT
    lengthen[c:, n_heads * n :].fill_diagonal_(math.sqrt(n_heads))
    eps = torch.tensor((count * RMS_EPS) ** 0.5)

    def attend(q: Tensor, row: Tensor, now: Now) -> Tensor:
        length = torch.linalg.vector_norm(row.float() @ lengthen, dim=-1, keepdim=True)
        inverse[:, now.row].squeeze(1).copy_(count**0.5 / torch.hypot(length, eps))
        keys, factors = rows[:, now.seen], inverse[:, now.seen]
        if keys.dtype == torch.float32:
            scores = torch.bmm(q, keys.mT).mul_(factors.mT)
            return torch.bmm(scores.softmax(-1), keys[..., :c])
        return attend_to_all(q[:, None], (keys * factors)[:, None], keys[:, None], 1.0)[:, 0, :, :c]

    return attend
