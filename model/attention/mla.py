"""Multi-head latent attention with decoupled RoPE (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are read from one narrow latent per token, which is all that decoding has to keep.
A rotation depends on the position and so cannot be folded into constant matrices; hence the position goes into a
few dimensions of its own, rotated, shared by all heads and kept beside the latent.

    q_nope | q_rope  per head      = q_proj x,  or  q_up norm(q_down x)
    latent | k_rope                = kv_down x;     latent = norm(latent)
    k_nope | v       per head      = kv_up latent
    score                          = (q_nope · k_nope + q_rope · k_rope) / sqrt(n + r)

The same parameters run in three ways:

    naive      keeps the keys and values of every head: the reference
    expanded   keeps the latent, and reads keys and values from it for all visible tokens
    absorbed   keeps the latent, and moves kv_up to the query's side:
               q_nope · (W_uk latent) = (W_ukᵀ q_nope) · latent,  and  sum p (W_uv latent) = W_uv (sum p latent);
               the latent then is the one wide key and value head of a multi-query attention
"""

import logging
import math
from collections import OrderedDict
from typing import Literal, Self, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from model.attention.base import (
    Attention,
    AttentionConfig,
    Context,
    grouped_kv_heads,
    head_dim_of,
    through_cache,
)
from model.cache import Cache, cache_for
from model.config import LARGEST, Dimensions, Size
from model.kernels.base import Kernel
from model.kernels.scores import said_of_scores
from model.mask import Mask
from model.norm import RMSNorm

Execution = Literal["auto", "naive", "expanded", "absorbed"]
Said = tuple[Tensor, dict[str, Tensor]]  # what attention gives per head, and what it says besides


class MLAConfig(AttentionConfig):
    """Unset dimensions follow head_dim = d_model / n_heads, so that keys and values are equally wide (n + r = v) and
    the absorbed key (c + r) stays narrow: the shapes flash kernels take. DeepSeek-V3 itself has c 512, n 128, r 64,
    v 128, q_lora_rank 1536."""

    q_lora_rank: int | None = Field(None, ge=0, le=LARGEST)  # 0 and None: queries straight from the hidden state
    kv_lora_rank: Size | None = None  # c: d_model / 4
    qk_nope_head_dim: Size | None = None  # n: head_dim - qk_rope_head_dim
    qk_rope_head_dim: int | None = Field(None, ge=0, le=LARGEST)  # r: head_dim / 4, made even; 0 if nothing rotates
    v_head_dim: Size | None = None  # v: head_dim
    k_rope_from: Literal["hidden", "latent"] = "hidden"  # the rope key is a projection of
    execution: Execution = "auto"  # auto: expanded to train, and where expanding costs less than absorbing

    def derive(self, dimensions: Dimensions) -> Self:
        rope_dim = self._rope_dim(dimensions)
        nope_dim = self.qk_nope_head_dim or head_dim_of(dimensions) - rope_dim
        if nope_dim < 1:
            raise ValueError(
                f"qk_rope_head_dim={rope_dim} leaves nothing of head_dim={rope_dim + nope_dim} for qk_nope_head_dim: "
                "choose a smaller one, or set qk_nope_head_dim"
            )
        derived = self.model_copy(
            update={
                "q_lora_rank": self.q_lora_rank or 0,
                "kv_lora_rank": self.kv_lora_rank or max(1, dimensions.d_model // 4),
                "qk_nope_head_dim": nope_dim,
                "qk_rope_head_dim": rope_dim,
                "v_head_dim": self.v_head_dim or head_dim_of(dimensions),
                "rope_original_context": self.original_context(dimensions),
            }
        )
        grouped = 2 * grouped_kv_heads(dimensions.n_heads) * derived.v_head_dim
        if derived.cache_elements > grouped:
            logging.getLogger("headroom").warning(
                f"MLA's cache of {derived.cache_elements} numbers per token and layer is larger than the {grouped} of "
                f"grouped-query attention: kv_lora_rank up to {grouped - rope_dim} would not be"
            )
        return derived

    def _rope_dim(self, dimensions: Dimensions) -> int:
        rope_dim = self.qk_rope_head_dim
        if self.position == "rope":
            if rope_dim == 0:
                raise ValueError("qk_rope_head_dim=0 leaves position=rope nothing to rotate: choose position=none")
            rope_dim = rope_dim or 2 * math.ceil(head_dim_of(dimensions) / 8)
            self.check_rotated("qk_rope_head_dim", rope_dim)
            return rope_dim
        if rope_dim:
            raise ValueError(
                f"position={self.position} needs qk_rope_head_dim=0, not {rope_dim}: leave it unset, or choose "
                "position=rope"
            )
        if self.k_rope_from == "latent":
            raise ValueError(f"k_rope_from=latent: position={self.position} has no rope key, choose position=rope")
        return 0

    def build(self, dimensions: Dimensions, kernel: Kernel, causal: bool = True) -> "MLA":
        return MLA(self, dimensions, kernel, causal)

    @property
    def executions(self) -> tuple[str, ...]:
        return get_args(Execution)

    @property
    def cache_elements(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    def described(self, n_heads: int) -> str:
        return f"MLA, {n_heads} heads on a latent of {self.kv_lora_rank} and a rotated key of {self.qk_rope_head_dim}"


class MLA(Attention):
    """Letters in comments: H heads, n and r the key dims without and with rotation, v the value dim, c the latent."""

    def __init__(self, config: MLAConfig, dimensions: Dimensions, kernel: Kernel, causal: bool):
        super().__init__()
        d_model, n_heads = dimensions.d_model, dimensions.n_heads
        n, r, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        self.n_heads, self.nope_dim, self.rope_dim, self.v_dim, self.rank = n_heads, n, r, v, c
        self.scale = (n + r) ** -0.5 * config.sharpening  # in absorbed form too, though its keys are c + r wide
        self.attend = kernel
        self.pattern = config.pattern(causal)
        self.rope = config.rope(r)
        self.biased = config.distance_bias(causal)
        self.q_proj = _query(d_model, config.q_lora_rank, n_heads * (n + r))  # rows of a head: nope | rope
        own = config.k_rope_from == "latent"
        self.kv_down = nn.Linear(d_model, c if own else c + r, bias=False)  # rows: latent | rope key
        self.kv_norm = RMSNorm(c)
        self.k_rope_proj = nn.Linear(c, r, bias=False) if own else None
        self.kv_up = nn.Linear(c, n_heads * (n + v), bias=False)  # rows of a head: k_nope | v
        self.o_proj = nn.Linear(n_heads * v, d_model, bias=False)
        # Expanding costs c(n+v) products per visible token and head, once; absorbing costs 2c-n-v more per query.
        self.break_even = c * (n + v) / (2 * c - n - v) if 2 * c > n + v else math.inf  # queries
        self.execute = {
            "auto": self._cheaper,
            "naive": self._naive,
            "expanded": self._expanded,
            "absorbed": self._absorbed,
        }[config.execution]
        self.caches_heads = config.execution == "naive"

    def forward(self, x: Tensor, ctx: Context, cache: Cache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], -1)
        q_rope = ctx.rotated(q_rope, self.rope)  # (B, T, H, r)
        down = self.kv_down(x).unsqueeze(2)
        latent, k_rope = self.kv_norm(down[..., : self.rank]), down[..., self.rank :]
        if self.k_rope_proj is not None:
            k_rope = self.k_rope_proj(latent)
        # One row per token, all that a latent cache keeps: (B, T, 1, c + r)
        row = torch.cat((latent, ctx.rotated(k_rope, self.rope)), dim=-1)
        y, said = self.execute(q_nope, q_rope, row, ctx, cache)  # (B, T, H, v)
        return self.o_proj(y.flatten(2)), said

    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        columns = {"latent_and_k_rope": (1, self.rank + self.rope_dim)}
        if self.caches_heads:
            columns = {"k": (self.n_heads, self.nope_dim + self.rope_dim), "v": (self.n_heads, self.v_dim)}
        return cache_for(self.pattern, batch_size, capacity, columns, like=self.kv_up.weight)

    def _naive(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        k, v = self._expand(row)
        (k, v), mask = through_cache(self.pattern, ctx, cache, k=k, v=v)
        return self._attend(torch.cat((q_nope, q_rope), -1), k, v, mask, ctx)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        (row,), mask = through_cache(self.pattern, ctx, cache, latent_and_k_rope=row)
        k, v = self._expand(row)
        return self._attend(torch.cat((q_nope, q_rope), -1), k, v, mask, ctx)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        (row,), mask = through_cache(self.pattern, ctx, cache, latent_and_k_rope=row)
        w_uk, w_uv = self.kv_up.weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, w_uk), q_rope), -1)  # (B, T, H, c + r)
        # The row serves as value too, without a copy; its rope columns are dropped from the output.
        y, said = self._attend(q, row, row, mask, ctx)
        return torch.einsum("bthc,hvc->bthv", y[..., : self.rank], w_uv), said

    def _cheaper(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        absorb = cache is not None and row.shape[1] <= self.break_even
        return (self._absorbed if absorb else self._expanded)(q_nope, q_rope, row, ctx, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, ctx: Context) -> Said:
        q, k = self.biased(q, k, mask, self.scale)
        return self.attend(q, k, v, mask, self.scale), said_of_scores(ctx.want, q, k, mask, self.scale)

    def _expand(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, 1, c + r) -> keys (B, S, H, n + r) and values (B, S, H, v)."""
        latent, k_rope = row.split([self.rank, self.rope_dim], -1)
        k_nope, v = (
            self.kv_up(latent.squeeze(2)).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], -1)
        )
        return torch.cat((k_nope, k_rope.expand(-1, -1, self.n_heads, -1)), -1), v


def _query(d_model: int, rank: int, width: int) -> nn.Module:
    """d_model -> width: one matrix, or through a normed latent of its own (then `down`, `norm` and `up`)."""
    if not rank:
        return nn.Linear(d_model, width, bias=False)
    down, up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width, bias=False)
    return nn.Sequential(OrderedDict(down=down, norm=RMSNorm(rank), up=up))
