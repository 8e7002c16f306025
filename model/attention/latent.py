"""Projections of multi-head latent attention: to queries, through a latent or not, and to the row that is cached."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention.base import AttentionConfig
from model.attention.indexer import Index
from model.context import Context
from model.dimensions import Dimensions
from model.linear import FanOut, Linear
from model.norm import RMSNorm
from model.rope import Rope


class Projected(NamedTuple):
    """What an attention with latents makes of its tokens. Letters as in model/attention/mla.py."""

    q_latent: Tensor | None  # (B, T, q_lora_rank), normed; None without one
    q_nope: Tensor  # (B, T, H, n)
    q_rope: Tensor  # (B, T, H, r), rotated
    row: Tensor  # (B, T, 1, c + r): latent, normed, and rotated rope key, which is what a latent KV cache stores
    index: Index | None = None  # what an indexer makes of them


class LatentProjections(FanOut):
    """Down-projections, norms and rotations of MLA. A base class, so that its parameters are the attention's own, under
    their published names."""

    def __init__(self, config: AttentionConfig, dimensions: Dimensions):
        """config: an MLAConfig."""
        super().__init__()
        self.n_heads = dimensions.n_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.rank = config.kv_lora_rank
        self.rope: Rope | None = config.rope(self.rope_dim)
        q_width = self.n_heads * (self.nope_dim + self.rope_dim)  # rows of a head: nope | rope
        self.q_proj = _query(dimensions, config.q_lora_rank, q_width, config.qk_bias)
        k_bias = config.qk_bias and self.rope_dim > 0
        if config.k_rope_from == "latent":
            self.kv_down = Linear(dimensions.d_model, self.rank, dimensions.bias)
        else:  # rows: latent | rope key
            self.kv_down = Linear(dimensions.d_model, self.rank + self.rope_dim, dimensions.bias or k_bias)
        self.kv_norm = RMSNorm(self.rank)
        self.k_rope_proj = Linear(self.rank, self.rope_dim, k_bias) if config.k_rope_from == "latent" else None
        per_head = config.qk_norm == "head"
        rope_norm = per_head and self.rope_dim > 0
        self.q_norm = RMSNorm(self.nope_dim + self.rope_dim) if config.qk_norm == "whole" else nn.Identity()
        self.q_nope_norm = RMSNorm(self.nope_dim) if per_head else nn.Identity()
        self.q_rope_norm = RMSNorm(self.rope_dim) if rope_norm else nn.Identity()
        self.k_rope_norm = RMSNorm(self.rope_dim) if rope_norm else nn.Identity()

    def project(self, x: Tensor, ctx: Context) -> Projected:
        """x (B, T, d_model) -> queries and rows of its tokens."""
        q, down = self.apply_each(x)
        q_latent, q = self._queries(q)
        q_nope, q_rope = self.q_norm(q.unflatten(-1, (self.n_heads, -1))).split([self.nope_dim, self.rope_dim], -1)
        down = down.unsqueeze(2)
        latent, k_rope = self.kv_norm(down[..., : self.rank]), down[..., self.rank :]
        if self.k_rope_proj is not None:
            k_rope = self.k_rope_proj(latent)
        q_rope = ctx.rotated(self.q_rope_norm(q_rope), self.rope)
        row = torch.cat((latent, ctx.rotated(self.k_rope_norm(k_rope), self.rope)), dim=-1)
        return Projected(q_latent, self.q_nope_norm(q_nope), q_rope, row)

    def of_one_input(self) -> tuple[Linear, ...]:
        return self.q_proj if isinstance(self.q_proj, Linear) else self.q_proj.down, self.kv_down

    def _queries(self, projected: Tensor) -> tuple[Tensor | None, Tensor]:
        """The query latent, if there is one, and the queries, of what the first query matrix gives."""
        if isinstance(self.q_proj, Linear):
            return None, projected
        q_latent = self.q_proj.norm(projected)
        return q_latent, self.q_proj.up(q_latent)


def _query(dimensions: Dimensions, rank: int, width: int, bias: bool) -> nn.Module:
    """Query projection, d_model -> width: one matrix, or with a rank through a normed latent (`down`, `norm`, `up`)."""
    if not rank:
        return Linear(dimensions.d_model, width, bias)
    down, up = Linear(dimensions.d_model, rank, dimensions.bias), Linear(rank, width, bias)
    return nn.Sequential(OrderedDict(down=down, norm=RMSNorm(rank), up=up))
