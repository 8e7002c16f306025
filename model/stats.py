"""What the scores x = scale · q kᵀ look like under the mask, for whoever watches a model: computed in tiles beside the
kernel, which never shows them. Nothing here has a gradient.

q (B, T, H, D), k (B, S, G, D) and the mask are those that a kernel takes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.base import group_queries
from model.kernels.online import LOWEST, rescale, scores_of_tile, tiles
from model.mask import Mask

TILE = 128  # queries, and keys, whose scores exist at one time
MONITORED_STATS = frozenset({"max_logit", "entropy"})
ATTENTION_MAP = "attention_map"


class Statistics(NamedTuple):
    """Of the scores x of each query and head; (B, T, H) each, float32."""

    log_sum_exp: Tensor  # log Σ e^x
    max_logit: Tensor  # max x
    entropy: Tensor  # of p = softmax(x): -Σ p log p, in nats


@torch.no_grad()
def statistics(q: Tensor, k: Tensor, mask: Mask, scale: float, tile: int = TILE) -> Statistics:
    """Memory grows as T. Beside the sum l = Σ e^(x - m) of the online softmax runs h = -Σ u log u, where u = e^(x - m);
    the entropy is log l + h / l. When a larger maximum shrinks every u by r, h becomes r h - l r log r."""
    found = tuple(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in Statistics._fields)
    for rows in tiles(slice(0, q.shape[1]), tile):
        q_i = group_queries(q[:, rows], k.shape[2])  # (B, t, G, R, D)
        m = torch.full(q_i.shape[:4], LOWEST, device=q.device)  # (B, t, G, R)
        total, h = torch.zeros_like(m), torch.zeros_like(m)
        for keys in tiles(mask.span(rows), tile):
            x = scores_of_tile(q_i, k, mask, scale, rows, keys)  # (B, t, G, R, s)
            m_new = torch.maximum(m, x.amax(-1))
            u, r = (x - m_new[..., None]).exp(), rescale(m, m_new)
            # entr(u) = -u log u, and 0 for 0
            h = h * r + total * torch.special.entr(r) + torch.special.entr(u).sum(-1)
            total, m = total * r + u.sum(-1), m_new
        for whole, part in zip(found, (m + total.log(), m, total.log() + h / total), strict=True):
            whole[:, rows] = part.flatten(2, 3)
    return Statistics(*found)


@torch.no_grad()
def head_summed(q: Tensor, k: Tensor, mask: Mask, scale: float, tile: int = TILE) -> Tensor:
    """(B, T, S) float32: how much of a query's attention a key gets, summed over the heads. That is T × S by nature;
    what it is summed from never exists for all heads at once."""
    # No setting reaches this yet: it is the target of an indexer to come, which learns where attention looks.
    summed = q.new_zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)
    log_sum_exp = statistics(q, k, mask, scale, tile).log_sum_exp.unflatten(2, (k.shape[2], -1))  # (B, T, G, R)
    for rows in tiles(slice(0, q.shape[1]), tile):
        q_i = group_queries(q[:, rows], k.shape[2])
        for keys in tiles(mask.span(rows), tile):
            x = scores_of_tile(q_i, k, mask, scale, rows, keys)  # (B, t, G, R, s)
            summed[:, rows, keys] = (x - log_sum_exp[:, rows, ..., None]).exp().sum((2, 3))
    return summed


@torch.no_grad()
def attention_map(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """(B, H, T, S) float32: softmax(x) of every head, by its definition. For short texts: all of it exists at once."""
    every = slice(0, q.shape[1]), slice(0, k.shape[1])
    x = scores_of_tile(group_queries(q, k.shape[2]), k, mask, scale, *every)  # (B, T, G, R, S)
    return x.softmax(-1).flatten(2, 3).transpose(1, 2)


def collect_stats(
    collect: frozenset[str], q: Tensor, k: Tensor, mask: Mask, scale: float, left_out: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """What an attention that is asked for it says of its scores; costs nothing where none of these is wanted. Padding
    does not count.

    max_logit (H,): the largest over queries and batch. entropy (H,): its mean over them, in nats. attention_map
    (B, H, T, S): all probabilities. left_out: what a query's scores lack that is the same for all keys, (B, T, H).
    """
    said = {}
    if ATTENTION_MAP in collect:
        said[ATTENTION_MAP] = attention_map(q, k, mask, scale)
    if collect & MONITORED_STATS:
        found, real = statistics(q, k, mask, scale), (mask.q_pos >= 0)[..., None]  # (B or 1, T, 1)
        real = real.expand(found.entropy.shape)  # (B, T, H)
        of_heads = {
            "max_logit": (found.max_logit + left_out).where(real, float("-inf")).amax((0, 1)),
            "entropy": found.entropy.where(real, 0).sum((0, 1)) / real.sum((0, 1)),
        }
        said |= {name: value for name, value in of_heads.items() if name in collect}
    return said
