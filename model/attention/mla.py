"""Multi-head latent attention with decoupled RoPE (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are read from one narrow latent per token, which is all that decoding has to keep.
A rotation depends on the position and so cannot be folded into constant matrices; hence the position goes into a
few dimensions of its own, rotated, shared by all heads and kept beside the latent.

    q_nope | q_rope  per head      = q_proj x,  or  q_up norm(q_down x)
    latent | k_rope                = kv_down x;     latent = norm(latent)
    k_nope | v       per head      = kv_up latent
    score                          = (q_nope · k_nope + q_rope · k_rope) / sqrt(n + r)

With qk_bias, what makes q and k_rope has a bias, kv_down whole; with model.bias, kv_down, q_down and o_proj do, as with
DeepSeek's attention_bias. One of kv_up would say nothing new: its part in k_nope adds the same to all scores of a
query, which softmax ignores, and its part in v reaches the output as a constant, which o_proj's bias is already.

With qk_norm=head the queries and keys of the heads are normed too, before the rotation; N is RMSNorm with a weight:

    q_nope = N q_nope,  q_rope = N q_rope   per head;     k_rope = N k_rope
    k_nope[h] = w ∘ k_nope[h] · inv[g(h)],  inv[g] = 1 / sqrt(mean of k_nope² over the heads and dims of group g + eps)

A norm of every head's keys cannot be folded into constant matrices, but what is not constant in it is one number per
token and group of heads, inv: it is kept beside the latent (c + r + groups numbers). With as many groups as heads the
norm is the usual one of each head; with one group, the default, the cache grows by a single number.

The same parameters run in three ways:

    naive      keeps the keys and values of every head: the reference
    expanded   keeps the latent, and reads keys and values from it for all visible tokens
    absorbed   keeps the latent, and moves kv_up to the query's side:
               q_nope · (W_uk latent) = (W_ukᵀ q_nope) · latent,  and  sum p (W_uv latent) = W_uv (sum p latent);
               the latent then is the one wide key and value head of a multi-query attention.
               With qk_norm=head: q_nope · (w ∘ W_uk latent · inv) = (W_ukᵀ (w ∘ q_nope)) · (inv latent), so there is
               one key head inv[g] latent | k_rope for each group, and the latent is the value of all
"""

import logging
import math
from collections import OrderedDict
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.attention.base import (
    Attention,
    AttentionConfig,
    Context,
    divisors,
    grouped_kv_heads,
    head_dim_of,
    update_cache,
)
from model.cache import Cache, cache_for
from model.dimensions import LARGEST, Dimensions, Size
from model.kernels.base import Kernel
from model.layout import MatrixLayout, single_matrix
from model.linear import Linear
from model.mask import Mask
from model.norm import GroupedRMSNorm, RMSNorm
from model.stats import collect_stats

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
    qk_norm: Literal["latent", "head"] = "latent"  # the latents are normed always; head: queries and keys as well
    qk_norm_groups: Size = 1  # groups of heads whose keys share one root mean square: n_heads norms each head
    execution: Execution = "auto"  # auto: expanded to train, and where expanding costs less than absorbing

    def derive(self, dimensions: Dimensions) -> Self:
        if self.qk_norm_groups > 1 and self.qk_norm == "latent":
            raise ValueError(
                f"qk_norm_groups={self.qk_norm_groups} has no heads to norm with qk_norm=latent: "
                "set attention.qk_norm=head"
            )
        if dimensions.n_heads % self.qk_norm_groups:
            raise ValueError(
                f"qk_norm_groups={self.qk_norm_groups} does not divide n_heads={dimensions.n_heads}: "
                f"choose one of {', '.join(map(str, divisors(dimensions.n_heads)))}"
            )
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
            fitting = grouped - (derived.cache_elements - derived.kv_lora_rank)
            logging.getLogger("headroom").warning(
                f"MLA's cache of {derived.cache_elements} numbers per token and layer is larger than the {grouped} of "
                f"grouped-query attention: kv_lora_rank up to {fitting} would not be"
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
        return self.kv_lora_rank + self.qk_rope_head_dim + (self.qk_norm_groups if self.qk_norm == "head" else 0)

    def qk_clip_obstacle(self) -> str | None:
        if self.qk_norm == "head":
            return "attention.qk_norm=head undoes any scaling of queries and keys: set it to latent"
        return super().qk_clip_obstacle()

    def describe(self, n_heads: int) -> str:
        rotated = f" and a rotated key of {self.qk_rope_head_dim}" if self.qk_rope_head_dim else ""
        return f"MLA, {n_heads} heads on a latent of {self.kv_lora_rank}{rotated}"


class MLA(Attention):
    """Letters in comments: H heads, n and r the key dims without and with rotation, v the value dim, c the latent."""

    def __init__(self, config: MLAConfig, dimensions: Dimensions, kernel: Kernel, causal: bool):
        super().__init__()
        d_model, n_heads = dimensions.d_model, dimensions.n_heads
        n, r, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        self.n_heads, self.nope_dim, self.rope_dim, self.v_dim, self.rank = n_heads, n, r, v, c
        self.scale = (n + r) ** -0.5 * config.sharpening  # in absorbed form too, though its keys are c + r wide
        self.attend, self.dropout = kernel, config.dropout
        self.pattern = config.pattern(causal)
        self.rope = config.rope(r)
        self.biased = config.distance_bias(causal)
        # Rows of a head: nope | rope
        self.q_proj = _query(d_model, config.q_lora_rank, n_heads * (n + r), config.qk_bias, dimensions.bias)
        own, k_bias = config.k_rope_from == "latent", config.qk_bias and r > 0
        down = c if own else c + r  # rows: latent | rope key
        self.kv_down = Linear(d_model, down, dimensions.bias or (k_bias and not own))
        self.kv_norm = RMSNorm(c)
        self.k_rope_proj = Linear(c, r, k_bias) if own else None
        heads, rotates = config.qk_norm == "head", r > 0
        self.q_nope_norm = RMSNorm(n) if heads else nn.Identity()
        self.q_rope_norm = RMSNorm(r) if heads and rotates else nn.Identity()
        self.k_rope_norm = RMSNorm(r) if heads and rotates else nn.Identity()
        self.k_nope_norm = GroupedRMSNorm(n, config.qk_norm_groups) if heads else None
        self.kv_up = Linear(c, n_heads * (n + v), bias=False)  # rows of a head: k_nope | v
        self.o_proj = Linear(n_heads * v, d_model, dimensions.bias)
        # Expanding costs c(n+v) products per visible token and head, once; absorbing costs 2c-n-v more per query.
        self.break_even = c * (n + v) / (2 * c - n - v) if 2 * c > n + v else math.inf  # queries
        self.execute = {
            "auto": self._cheaper,
            "naive": self._naive,
            "expanded": self._expanded,
            "absorbed": self._absorbed,
        }[config.execution]
        self.caches_heads = config.execution == "naive"
        # The latent row is the absorbed value, and its rope columns are multiplied before they are dropped.
        width = 2 * (c + r) if config.execution == "absorbed" else n + r + v
        self.macs_per_pair = n_heads * (width + config.bias_columns)
        if heads and config.execution == "absorbed":
            self.extra_macs_per_token = n_heads * n * c  # k_nope, for the norm

    def forward(self, x: Tensor, ctx: Context, cache: Cache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], -1)
        q_nope = self.q_nope_norm(q_nope)  # (B, T, H, n)
        q_rope = ctx.rotated(self.q_rope_norm(q_rope), self.rope)  # (B, T, H, r)
        down = self.kv_down(x).unsqueeze(2)
        latent, k_rope = self.kv_norm(down[..., : self.rank]), down[..., self.rank :]
        if self.k_rope_proj is not None:
            k_rope = self.k_rope_proj(latent)
        # One row per token, all that a latent cache keeps (but for inv): (B, T, 1, c + r)
        row = torch.cat((latent, ctx.rotated(self.k_rope_norm(k_rope), self.rope)), dim=-1)
        y, said = self.execute(q_nope, q_rope, row, ctx, cache)  # (B, T, H, v)
        return self.o_proj(y.flatten(2)), said

    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        columns = {"latent_and_k_rope": (1, self.rank + self.rope_dim)}
        if self.k_nope_norm is not None:
            columns["inverse_rms"] = (self.k_nope_norm.groups, 1)
        if self.caches_heads:
            columns = {"k": (self.n_heads, self.nope_dim + self.rope_dim), "v": (self.n_heads, self.v_dim)}
        return cache_for(self.pattern, batch_size, capacity, columns, like=self.kv_up.weight)

    def param_layout(self) -> dict[str, MatrixLayout]:
        n, r, v, c, h = self.nope_dim, self.rope_dim, self.v_dim, self.rank, self.n_heads
        rotates, own = r > 0, self.k_rope_proj is not None
        query = MatrixLayout(h, {"q_nope": n} | ({"q_rope": r} if rotates else {}))
        found = {"q_proj.weight": query}
        if isinstance(self.q_proj, nn.Sequential):
            found = {
                "q_proj.down.weight": single_matrix("q_latent", self.q_proj.down.out_features),
                "q_proj.up.weight": query,
            }
        return found | {
            "kv_down.weight": MatrixLayout(1, {"latent": c} | ({"k_rope": r} if rotates and not own else {})),
            "kv_up.weight": MatrixLayout(h, {"k_nope": n, "v": v}),
            "o_proj.weight": single_matrix("o", self.o_proj.out_features),
            **({"k_rope_proj.weight": single_matrix("k_rope", r)} if own else {}),
        }

    def _naive(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        k, v = self._expand(row)
        (k, v), mask = update_cache(self.pattern, ctx, cache, k=k, v=v)
        return self._attend(torch.cat((q_nope, q_rope), -1), k, v, mask, ctx)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        kept = {"latent_and_k_rope": row} if cache is None else self._kept(row)
        (row, *_), mask = update_cache(self.pattern, ctx, cache, **kept)
        k, v = self._expand(row)
        return self._attend(torch.cat((q_nope, q_rope), -1), k, v, mask, ctx)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        (row, *inverse), mask = update_cache(self.pattern, ctx, cache, **self._kept(row))
        w_uk, w_uv = self._up_per_head()
        key = row
        if self.k_nope_norm is not None:
            q_nope = (q_nope * self.k_nope_norm.weight).to(row.dtype)
            row = row.expand(-1, -1, self.k_nope_norm.groups, -1)
            latent, k_rope = row.split([self.rank, self.rope_dim], -1)
            key = torch.cat((latent * inverse[0], k_rope), -1)  # (B, S, G, c + r)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, w_uk), q_rope), -1)  # (B, T, H, c + r)
        # The row serves as value too, without a copy; its rope columns are dropped from the output.
        y, said = self._attend(q, key, row, mask, ctx)
        return torch.einsum("bthc,hvc->bthv", y[..., : self.rank], w_uv), said

    def _cheaper(self, q_nope: Tensor, q_rope: Tensor, row: Tensor, ctx: Context, cache: Cache | None) -> Said:
        absorb = cache is not None and row.shape[1] <= self.break_even
        return (self._absorbed if absorb else self._expanded)(q_nope, q_rope, row, ctx, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, ctx: Context) -> Said:
        q, k, left_out = self.biased(q, k, mask, self.scale)
        y = self.attend(q, k, v, mask, self.scale, ctx.dropped(self.dropout))
        return y, collect_stats(ctx.collect, q, k, mask, self.scale, left_out)

    def _expand(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, 1, c + r) -> keys (B, S, H, n + r) and values (B, S, H, v)."""
        latent, k_rope = row.split([self.rank, self.rope_dim], -1)
        k_nope, v = (
            self.kv_up(latent.squeeze(2)).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], -1)
        )
        if self.k_nope_norm is not None:
            k_nope = self.k_nope_norm(k_nope)
        return torch.cat((k_nope, k_rope.expand(-1, -1, self.n_heads, -1)), -1), v

    def _kept(self, row: Tensor) -> dict[str, Tensor]:
        """What a latent cache keeps of these tokens. inv needs their k_nope, computed for it alone."""
        if self.k_nope_norm is None:
            return {"latent_and_k_rope": row}
        w_uk, _ = self._up_per_head()
        k_nope = F.linear(row[..., 0, : self.rank], w_uk.flatten(0, 1)).unflatten(-1, (self.n_heads, -1))
        return {"latent_and_k_rope": row, "inverse_rms": self.k_nope_norm.inverse_rms(k_nope)[..., None].to(row.dtype)}

    def _up_per_head(self) -> tuple[Tensor, Tensor]:
        """kv_up as W_uk (H, n, c) and W_uv (H, v, c)."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)


def _query(d_model: int, rank: int, width: int, bias: bool, down_bias: bool) -> nn.Module:
    """d_model -> width: one matrix, or through a normed latent of its own (then `down`, `norm` and `up`)."""
    if not rank:
        return Linear(d_model, width, bias)
    down, up = Linear(d_model, rank, down_bias), Linear(rank, width, bias)
    return nn.Sequential(OrderedDict(down=down, norm=RMSNorm(rank), up=up))
