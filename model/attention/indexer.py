"""Lightning indexer (DeepSeek-V3.2, arXiv:2512.02556, section 2.1): a small attention that chooses the keys each query
attends to. Of query t and key s, with Hi heads of width D, one index key per token, and w a number per head and query:

    I(t, s) = Σ_j w(t, j) · ReLU(q_j(t) · k(s)) / sqrt(Hi · D)

A query attends to the top_k visible keys of the largest I; of equal ones, which ReLU makes often, to the first. Where
no more than top_k are visible that is dense attention.

A choice has no gradient. The indexer learns by a loss of its own, to look where attention looks: KL(p ‖ softmax I),
over the keys that a query attends to, where p is its attention, the mean over the heads. Its inputs and p are detached:
the loss moves the indexer alone, and the cross-entropy all else. With stage=warmup attention is dense, and nothing but
the indexer learns.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.cache import Cache
from model.context import Context
from model.kernels.base import group_queries
from model.kernels.online import scores_of_tile, tiles
from model.layout import Names, ParamLayout, Part, Role, linear, nested
from model.linear import Linear
from model.mask import Mask
from model.norm import LayerNorm
from model.rope import Rope
from model.upcast import upcast

INDEXER_LOSS = "indexer_loss"
TILE_NUMBERS = 2**22  # products that are in memory at one time
MANY_QUERIES = 12  # which have so many keys in common that masking takes less time than gathering for each (measured)


class Index(NamedTuple):
    """What an indexer makes of the tokens of a forward pass."""

    q: Tensor  # (B, T, Hi, D)
    k: Tensor  # (B, T, D), which is cached
    weights: Tensor  # (B, T, Hi) float32, w / sqrt(Hi · D)
    top_k: int
    warms_up: bool  # and attention is dense

    def scores(self, k: Tensor, mask: Mask, rows: slice, keys: slice) -> Tensor:
        """I of the queries in `rows` and the keys in `keys` of k (B, S, D) -> (B, t, s) float32, -∞ for hidden keys."""
        return _scores(self.q[:, rows], self.weights[:, rows], k[:, keys], mask.visible_in(rows, keys))

    def chosen(self, k: Tensor, mask: Mask, rows: slice) -> Tensor:
        """For the queries in `rows`, which of all keys k (B, S, D) they attend to -> (B, t, S) bool: top_k of them, of
        which hidden ones are some where fewer are visible."""
        with torch.no_grad():  # no decorator: compiled in one graph, it cannot be traced
            return largest(self.scores(k, mask, rows, slice(0, k.shape[1])), self.top_k)

    def chosen_rows(self, k: Tensor, mask: Mask, rows: slice) -> Tensor:
        """The same as indices of keys, in order: (B, t, top_k). There are more keys than that."""
        chosen = self.chosen(k, mask, rows)
        if not torch.compiler.is_compiling():
            return chosen.nonzero()[:, -1].view(*chosen.shape[:2], self.top_k)
        index = torch.arange(chosen.shape[2], device=chosen.device)  # nonzero would break the graph
        return index.where(chosen, len(index)).topk(self.top_k, largest=False).values

    def in_tiles(self, choose: Callable[[Tensor, Mask, slice], Tensor], k: Tensor, mask: Mask) -> Tensor:
        """What `chosen` or `chosen_rows` returns, for all queries, a tile of them after the other."""
        if self.q.shape[1] == 1:  # a decode step, which is not to be traced anew for each number of keys
            return choose(k, mask, slice(0, 1))
        every = self.tiles(self.q.shape[1], k.shape[1], self.q.shape[2])
        return torch.cat([choose(k, mask, rows) for rows in every], dim=1)

    def gathers(self, ctx: Context, cache: Cache | None) -> bool:
        """Whether the chosen keys are gathered, and the others never read. Where a gradient flows, without a cache, or
        where most keys are chosen anyway, all are read and those not chosen masked."""
        if cache is None or self.warms_up or torch.is_grad_enabled() or ctx.collect:
            return False
        at, queries = ctx.at, self.q.shape[1]
        most = cache.capacity if at.kv_len is None else min(at.kv_len, cache.capacity)
        seen = queries if at.is_contiguous else most
        return seen > self.top_k * min(queries, MANY_QUERIES)

    def tiles(self, queries: int, keys: int, numbers: int) -> Iterator[slice]:
        """Spans of the queries; of a pair of query and key, so many numbers are in memory."""
        return tiles(slice(0, queries), max(1, TILE_NUMBERS // (self.q.shape[0] * keys * numbers)))


def largest(scores: Tensor, count: int) -> Tensor:
    """Which are the `count` largest of each row (..., S), of equal ones the first -> bool, count of them (or all S).
    NaN counts as -∞, so that a model that is broken chooses as many, and its output says so."""
    if scores.shape[-1] <= count:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(count).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _scores(q: Tensor, weights: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    products = torch.einsum("bthd,bsd->bths", upcast(q), upcast(k)).relu()
    return torch.einsum("bths,bth->bts", products, weights).masked_fill(~visible, float("-inf"))


def indexer_loss(index: Index, k_index: Tensor, q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """KL(p ‖ softmax I) in nats, the mean over the queries that are no padding; scalar.

    k_index (B, S, D): the indexer's keys; q (B, T, H, ·), k (B, S, G, ·): those of the attention, with the scale of its
    scores; mask: what it sees, a choice included. In tiles of queries, which the backward pass recomputes.
    """
    q, k = q.detach(), k.detach()
    total = torch.zeros((), device=q.device)
    for rows in index.tiles(q.shape[1], k.shape[1], q.shape[2] + index.q.shape[2]):
        given = index.q[:, rows], index.weights[:, rows], k_index, q[:, rows], k, mask, scale, rows
        total = total + checkpoint(_summed_kl, *given, use_reentrant=False, preserve_rng_state=False)
    return total / (mask.q_pos >= 0).expand(q.shape[:2]).sum().clamp(min=1)


def _summed_kl(*given: Any) -> Tensor:
    q_index, weights, k_index, q, k, mask, scale, rows = given
    keys = mask.span(rows)
    visible = mask.visible_in(rows, keys)
    with torch.no_grad():
        x = scores_of_tile(group_queries(q, k.shape[2]), k, mask, scale, rows, keys)  # (B, t, G, R, s)
        p = x.softmax(-1).mean((2, 3))  # (B, t, s)
    log_share = _scores(q_index, weights, k_index[:, keys], visible).log_softmax(-1).masked_fill(~visible, 0)
    kl = (torch.xlogy(p, p) - p * log_share).sum(-1)
    return kl.masked_fill(mask.q_pos[:, rows] < 0, 0).sum()


class Indexer(nn.Module):
    """Projections of an indexer: queries from `source` (a query latent, or the hidden state), keys and weights from the
    hidden state, keys through a LayerNorm with bias."""

    def __init__(self, config: Any, d_model: int, query_dim: int, rope: Rope | None):
        """config: a derived IndexerConfig."""
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.top_k = config.top_k
        self.weight = config.weight
        self.warms_up = config.stage == "warmup"
        self.rope = rope
        self.q_proj = Linear(query_dim, self.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, self.head_dim, bias=False)
        self.k_norm = LayerNorm(self.head_dim, bias=True, eps=1e-6)
        self.weights_proj = Linear(d_model, self.n_heads, bias=False)
        self.macs_per_pair = self.n_heads * (self.head_dim + 1)

    def forward(self, x: Tensor, source: Tensor, ctx: Context) -> Index:
        """x (B, T, d_model), source (B, T, query_dim), which get no gradient."""
        x, source = x.detach(), source.detach()
        q = ctx.rotated(self.q_proj(source).unflatten(-1, (self.n_heads, -1)), self.rope)
        k = ctx.rotated(self.k_norm(self.k_proj(x)).unsqueeze(2), self.rope).squeeze(2)
        weights = upcast(self.weights_proj(x)) * (self.n_heads * self.head_dim) ** -0.5
        return Index(q, k, weights, self.top_k, self.warms_up)

    def layout(self) -> dict[str, ParamLayout]:
        query = Part("q", self.head_dim)
        return {
            **linear("q_proj", self.q_proj, Role.INDEXER, self.n_heads, query, published=Names("wq_b")),
            **linear("k_proj", self.k_proj, Role.INDEXER, published=Names("wk")),
            **linear("weights_proj", self.weights_proj, Role.INDEXER, published=Names("weights_proj")),
            **nested("k_norm", self.k_norm, Names("k_norm")),
        }
