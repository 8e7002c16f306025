"""Attention statistics: maximum and entropy of the scores x = scale · q kᵀ under the mask, and attention maps. Computed
in tiles beside the kernel, which does not return its scores. Nothing here has a gradient.

q (B, T, H, D), k (B, S, G, D) and the mask are those that a kernel takes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.base import group_queries
from model.kernels.online import LOWEST, rescale, scores_of_tile, tiles
from model.mask import Mask
from model.upcast import upcast_dtype

TILE = 128  # queries, and keys, whose scores are in memory at one time
MONITORED_STATS = frozenset({"max_logit", "entropy"})
ATTENTION_MAP = "attention_map"


class Statistics(NamedTuple):
    """Statistics of the scores x of each query and head; (B, T, H) each, float32."""

    log_sum_exp: Tensor  # log Σ e^x
    max_logit: Tensor  # max x
    entropy: Tensor  # -Σ p log p in nats, with p = softmax(x)


@torch.no_grad()
def statistics(q: Tensor, k: Tensor, mask: Mask, scale: float, tile: int = TILE) -> Statistics:
    """Compute Statistics in one pass over tiles of keys, in memory that grows as T.

    Beside the online softmax's sum l = Σ e^(x - m) runs h = -Σ u log u, where u = e^(x - m); the entropy is
    log l + h / l. When a larger maximum shrinks every u by r, h becomes r h - l r log r."""
    found = tuple(q.new_empty(q.shape[:3], dtype=upcast_dtype(q)) for _ in Statistics._fields)
    for rows in tiles(slice(0, q.shape[1]), tile):
        q_i = group_queries(q[:, rows], k.shape[2])  # (B, t, G, R, D)
        m = torch.full(q_i.shape[:4], LOWEST, dtype=upcast_dtype(q), device=q.device)  # (B, t, G, R)
        total = torch.zeros_like(m)  # l
        h = torch.zeros_like(m)
        for keys in tiles(mask.span(rows), tile):
            x = scores_of_tile(q_i, k, mask, scale, rows, keys)  # (B, t, G, R, s)
            m_new = torch.maximum(m, x.amax(-1))
            u = (x - m_new[..., None]).exp()
            r = rescale(m, m_new)
            # entr(u) = -u log u, and 0 for 0
            h = h * r + total * torch.special.entr(r) + torch.special.entr(u).sum(-1)
            total = total * r + u.sum(-1)
            m = m_new
        of_tile = Statistics(log_sum_exp=m + total.log(), max_logit=m, entropy=total.log() + h / total)
        for result, values in zip(found, of_tile, strict=True):
            result[:, rows] = values.flatten(2, 3)
    return Statistics(*found)


@torch.no_grad()
def head_summed(q: Tensor, k: Tensor, mask: Mask, scale: float, tile: int = TILE) -> Tensor:
    """Attention weights summed over the heads, (B, T, S) float32. The sum takes T × S memory; weights per head exist a
    tile at a time."""
    # No setting reaches this yet: it is the target of an indexer to come, which learns where attention looks.
    summed = q.new_zeros(q.shape[0], q.shape[1], k.shape[1], dtype=upcast_dtype(q))
    log_sum_exp = statistics(q, k, mask, scale, tile).log_sum_exp.unflatten(2, (k.shape[2], -1))  # (B, T, G, R)
    for rows in tiles(slice(0, q.shape[1]), tile):
        q_i = group_queries(q[:, rows], k.shape[2])
        for keys in tiles(mask.span(rows), tile):
            x = scores_of_tile(q_i, k, mask, scale, rows, keys)  # (B, t, G, R, s)
            summed[:, rows, keys] = (x - log_sum_exp[:, rows, ..., None]).exp().sum((2, 3))
    return summed


@torch.no_grad()
def attention_map(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention map: softmax(x) of every head, (B, H, T, S) float32. For short texts: it is in memory all at once."""
    every = slice(0, q.shape[1]), slice(0, k.shape[1])
    x = scores_of_tile(group_queries(q, k.shape[2]), k, mask, scale, *every)  # (B, T, G, R, S)
    return x.softmax(-1).flatten(2, 3).transpose(1, 2)


def collect_stats(
    collect: frozenset[str], q: Tensor, k: Tensor, mask: Mask, scale: float, row_offset: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Compute the auxiliary outputs in `collect` that concern scores; free if there are none. Padding does not count.

    max_logit (H,): the largest over queries and batch. entropy (H,): the mean over queries and batch, in nats.
    attention_map (B, H, T, S): all probabilities. row_offset (B, T, H): a query's term that q kᵀ leaves out because
    it is the same for all keys (`BiasedQK`); max_logit includes it.
    """
    aux = {}
    if ATTENTION_MAP in collect:
        aux[ATTENTION_MAP] = attention_map(q, k, mask, scale)
    if collect & MONITORED_STATS:
        found = statistics(q, k, mask, scale)
        is_token = (mask.q_pos >= 0)[..., None].expand(found.entropy.shape)  # (B, T, H)
        per_head = {
            "max_logit": (found.max_logit + row_offset).where(is_token, float("-inf")).amax((0, 1)),
            "entropy": found.entropy.where(is_token, 0).sum((0, 1)) / is_token.sum((0, 1)),
        }
        aux |= {name: value for name, value in per_head.items() if name in collect}
    return aux
