"""Multi-head latent attention with decoupled RoPE (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are projected up from one narrow latent per token, so decoding needs a latent KV cache
only. A rotation depends on the position and so cannot be folded into constant matrices; hence the position
goes into a few dimensions of its own, rotated, shared by all heads and cached beside the latent.

    q_nope | q_rope  per head      = q_proj x,  or  q_up norm(q_down x)
    latent | k_rope                = kv_down x;     latent = norm(latent)
    k_nope | v       per head      = kv_up latent
    score                          = (q_nope · k_nope + q_rope · k_rope) / sqrt(n + r)

qk_bias adds a bias to the projections to q and to k_rope, the latter being part of kv_down, which gets one for all
its rows; model.bias adds one to kv_down, q_down and o_proj, as DeepSeek's attention_bias does. kv_up has none: in v
it would add a constant to the output, as o_proj's bias does, and in k_nope, where keys are not normed, the same to all
scores of a query, which softmax ignores.

qk_norm=head also norms the queries and keys of the heads, before the rotation; N is RMSNorm with a weight:

    q_nope = N q_nope,  q_rope = N q_rope   per head;     k_rope = N k_rope
    k_nope[h] = w ∘ k_nope[h] · inv[g(h)],  inv[g] = 1 / sqrt(mean of k_nope² over the heads and dims of group g + eps)

qk_norm=whole norms the rotated and the other part of a head together, so that a head can turn to positions alone, or to
contents alone, by making one part large: the other shrinks. The rope key counts in every head, and keys have no weight,
which would not commute with the rotation:

    q = N [q_nope | q_rope]  per head;     k[h] = [k_nope[h] | k_rope] · inv[g(h)],  inv of whole keys

A norm of every head's keys cannot be folded into constant matrices, but its only factor that is not constant is inv,
one value per token and group of heads: it is cached beside the latent (c + r + groups elements per token). With as many
groups as heads the norm is the usual one of each head; with one group, the default, the cache grows by one element.

The same parameters run in three ways (`execution`):

    naive      caches the keys and values of every head: the reference
    expanded   caches the latent, and projects keys and values up from it for all visible tokens
    absorbed   caches the latent, and moves kv_up to the query's side:
               q_nope · (W_uk latent) = (W_ukᵀ q_nope) · latent,  and  sum p (W_uv latent) = W_uv (sum p latent);
               the latent then is the one wide key and value head of a multi-query attention.
               With qk_norm=head: q_nope · (w ∘ W_uk latent · inv) = (W_ukᵀ (w ∘ q_nope)) · (inv latent), so there is
               one key head inv[g] latent | k_rope for each group, and the latent is the value of all.
               With qk_norm=whole that key head is inv[g] (latent | k_rope), and no weight is moved
"""

import logging
import math
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from model.attention.base import divisors, grouped_kv_heads, head_dim_of
from model.attention.core import Heads
from model.attention.flat_mla import flat_absorbed
from model.attention.indexed import IndexedAttention, IndexedConfig
from model.attention.latent import LatentProjections, Projected
from model.cache import Cache
from model.context import Context
from model.dimensions import MAX_SIZE, Dimensions, Size
from model.flat_step import FlatAttention
from model.kernels.base import Kernel
from model.layout import Names, ParamLayout, Part, Role, linear, nested
from model.linear import Linear
from model.norm import GroupedRMSNorm, RMSNorm, are_plain, inverse_rms, unit_rms

MAX_FLASH_KEY = 256  # the widest key of flash kernels
MAX_ROPE_KEY = 64  # the widest by default, as in DeepSeek-V3: wider ones would leave the latent little of those 256
Execution = Literal["auto", "naive", "expanded", "absorbed"]


class MLAConfig(IndexedConfig):
    """Settings of MLA. Unset dimensions follow head_dim = d_model / n_heads, so that keys and values are equally wide
    (n + r = v) and the absorbed key (c + r, and the columns of ALiBi) is at most 256 wide: the shapes flash kernels
    take. Three quarters of a head rotate, up to 64 dimensions, and whole heads are normed, with which small models
    learn to look back sooner (docs/studies/why_mla_is_behind.md). DeepSeek-V3 has c 512, n 128, r 64, v 128,
    q_lora_rank 1536 and qk_norm=latent."""

    # 0: q_proj reads the hidden state directly; None: the same, and d_model / 2 with an indexer, which reads the latent
    q_lora_rank: int | None = Field(ge=0, le=MAX_SIZE)
    kv_lora_rank: Size | None  # c; unset: d_model / 4, or what 256 leaves beside r
    qk_nope_head_dim: Size | None  # n; unset: head_dim - qk_rope_head_dim
    qk_rope_head_dim: int | None = Field(ge=0, le=MAX_SIZE)  # r; unset: 3/4 head_dim, even, up to 64; 0 without RoPE
    v_head_dim: Size | None  # v; unset: head_dim
    k_rope_from: Literal["hidden", "latent"]  # what the rope key is projected from
    # Latents are always normed; head: so are both parts of each head's queries and keys; whole: the two parts together;
    # unset: whole if model.qk_norm, else latent
    qk_norm: Literal["latent", "head", "whole"] | None
    qk_norm_groups: Size  # groups of heads whose keys share one root mean square; n_heads: each its own
    execution: Execution  # auto: absorbed with a cache and few queries (break_even), else expanded

    def derive(self, dimensions: Dimensions) -> Self:
        qk_norm = self.qk_norm or ("whole" if dimensions.qk_norm else "latent")
        self._check_groups(qk_norm, dimensions.n_heads)
        rope_dim = self._rope_dim(dimensions)
        nope_dim = self.qk_nope_head_dim or head_dim_of(dimensions) - rope_dim
        if nope_dim < 1:
            raise ValueError(
                f"qk_rope_head_dim={rope_dim} leaves nothing of head_dim={rope_dim + nope_dim} for qk_nope_head_dim: "
                "choose a smaller one, or set qk_nope_head_dim"
            )
        derived = self.model_copy(
            update={
                **self.of_model(dimensions),
                "q_lora_rank": self._query_rank(dimensions.d_model),
                "indexer": self.derived_indexer(dimensions),
                "kv_lora_rank": self.kv_lora_rank or self._latent_dim(dimensions.d_model, rope_dim),
                "qk_nope_head_dim": nope_dim,
                "qk_rope_head_dim": rope_dim,
                "v_head_dim": self.v_head_dim or head_dim_of(dimensions),
                "qk_norm": qk_norm,
            }
        )
        derived._warn_of_large_cache(dimensions.n_heads)
        return derived

    def _query_rank(self, d_model: int) -> int:
        top_k = self.indexer.top_k
        if top_k is not None and self.q_lora_rank == 0:
            raise ValueError(
                f"indexer.top_k={top_k}: the indexer reads the latent of the queries, and q_lora_rank=0 has none: "
                f"set attention.q_lora_rank to null, which is {max(1, d_model // 2)} here, or to another rank"
            )
        return self.q_lora_rank or (0 if top_k is None else max(1, d_model // 2))

    def _check_groups(self, qk_norm: str, n_heads: int) -> None:
        if self.qk_norm_groups > 1 and qk_norm == "latent":
            raise ValueError(
                f"qk_norm_groups={self.qk_norm_groups} has no heads to norm with qk_norm=latent: "
                "set attention.qk_norm=whole or head"
            )
        if n_heads % self.qk_norm_groups:
            raise ValueError(
                f"qk_norm_groups={self.qk_norm_groups} does not divide n_heads={n_heads}: "
                f"choose one of {', '.join(map(str, divisors(n_heads)))}"
            )

    def _latent_dim(self, d_model: int, rope_dim: int) -> int:
        """Derive an unset kv_lora_rank: d_model / 4, or less, so that the absorbed key (latent, rope key, columns of
        ALiBi) is no wider than flash kernels take."""
        return max(1, min(d_model // 4, MAX_FLASH_KEY - rope_dim - self.bias_columns))

    def _warn_of_large_cache(self, n_heads: int) -> None:
        grouped = 2 * grouped_kv_heads(n_heads) * self.v_head_dim
        if self.cache_elements > grouped:
            fitting = grouped - (self.cache_elements - self.kv_lora_rank)
            logging.getLogger("headroom").warning(
                f"MLA's cache of {self.cache_elements} numbers per token and layer is larger than the {grouped} of "
                f"grouped-query attention: kv_lora_rank up to {fitting} would not be"
            )

    def _rope_dim(self, dimensions: Dimensions) -> int:
        rope_dim = self.qk_rope_head_dim
        if self.position == "rope":
            if rope_dim == 0:
                raise ValueError("qk_rope_head_dim=0 leaves position=rope nothing to rotate: choose position=none")
            rope_dim = rope_dim or min(max(2, head_dim_of(dimensions) * 3 // 8 * 2), MAX_ROPE_KEY)
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
        inverse = 0 if self.qk_norm == "latent" else self.qk_norm_groups
        return self.kv_lora_rank + self.qk_rope_head_dim + inverse + self.index_elements

    def qk_clip_obstacle(self) -> str | None:
        if self.qk_norm != "latent":
            return f"attention.qk_norm={self.qk_norm} undoes any scaling of queries and keys: set it to latent"
        return super().qk_clip_obstacle()

    def describe(self, n_heads: int) -> str:
        rotated = f" and a rotated key of {self.qk_rope_head_dim}" if self.qk_rope_head_dim else ""
        return f"MLA, {n_heads} heads on a latent of {self.kv_lora_rank}{rotated}{self.described_indexer}"


class MLA(LatentProjections, IndexedAttention):
    """Multi-head latent attention; the formulas stand at the top. Letters: H heads, n and r the key dimensions
    without and with rotation, v the value dimension, c the latent's width (kv_lora_rank)."""

    def __init__(self, config: MLAConfig, dimensions: Dimensions, kernel: Kernel, causal: bool):
        super().__init__(config, dimensions)
        self.core = config.core(kernel, causal, self.nope_dim + self.rope_dim)
        self.indexer = config.build_indexer(dimensions.d_model, config.q_lora_rank, self.rope_dim)
        self.v_dim = config.v_head_dim
        self.whole_keys = config.qk_norm == "whole"
        self.key_groups = config.qk_norm_groups
        self.caches_inverse = config.qk_norm != "latent"
        self.k_nope_norm = GroupedRMSNorm(self.nope_dim, self.key_groups) if config.qk_norm == "head" else None
        self.kv_up = Linear(self.rank, self.n_heads * (self.nope_dim + self.v_dim), bias=False)  # per head: k_nope | v
        self.o_proj = Linear(self.n_heads * self.v_dim, dimensions.d_model, dimensions.bias)
        self.break_even = break_even(self.rank, self.nope_dim + self.v_dim)
        self.execute = {
            "auto": self._cheaper,
            "naive": self._naive,
            "expanded": self._expanded,
            "absorbed": self._absorbed,
        }[config.execution]
        self.caches_heads = config.execution == "naive"
        self.macs_per_pair = self._macs_per_pair(config)
        if self.caches_inverse and config.execution == "absorbed":
            self.extra_macs_per_token = self.n_heads * self.nope_dim * self.rank  # k_nope, for the norm

    def _macs_per_pair(self, config: MLAConfig) -> int:
        """Multiply-adds per query and key in training. Absorbed, the latent row is the value too; where it is
        not the key itself, its rope columns are multiplied before they are dropped."""
        key, value = self.nope_dim + self.rope_dim, self.v_dim
        if config.execution == "absorbed":
            key = self.rank + self.rope_dim
            value = key if self.caches_inverse else self.rank
        return self.n_heads * (key + value + config.bias_columns) + self.index_macs_per_pair

    def heads(self, x: Tensor, ctx: Context, cache: Cache | None, carried: Any) -> Heads:
        given = self.project(x, ctx)
        return self.execute(given._replace(index=self.index(x, given.q_latent, ctx)), ctx, cache)

    def flat(self, cache: Cache) -> FlatAttention | None:
        """Absorbed, where whole keys are normed together or none are, and rotate."""
        joined = self.joined()
        ours = type(self) is MLA and self.indexer is None and self.execute in (self._cheaper, self._absorbed)
        usual = self.k_nope_norm is None and self.k_rope_proj is None and self.rope is not None and self.key_groups == 1
        parts = [self.q_proj] if isinstance(self.q_proj, Linear) else list(self.q_proj)
        plain = are_plain(self.q_norm, self.kv_norm) and all(type(part) in (Linear, RMSNorm) for part in parts)
        if joined is None or not (ours and usual and plain and self.is_plain(cache)):
            return None
        return flat_absorbed(self, joined, cache)

    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        if self.caches_heads:
            columns = {"k": (self.n_heads, self.nope_dim + self.rope_dim), "v": (self.n_heads, self.v_dim)}
        else:
            columns = {"latent_and_k_rope": (1, self.rank + self.rope_dim)}
            if self.caches_inverse:
                columns["inverse_rms"] = (self.key_groups, 1)
        return self.core.make_cache(batch_size, capacity, columns | self.index_column, like=self.kv_up.weight)

    def layout(self) -> dict[str, ParamLayout]:
        # The rope key is no head's own: QK-clip leaves it, and q_rope makes up for it.
        query = (Part("q_nope", self.nope_dim, clip_power=0.5), Part("q_rope", self.rope_dim, clip_power=1.0))
        down = (Part("latent", self.rank), Part("k_rope", self.kv_down.out_features - self.rank))
        up = (Part("k_nope", self.nope_dim, clip_power=0.5), Part("v", self.v_dim))
        return {
            **self._query_layout(query),
            **linear("kv_down", self.kv_down, Role.LATENT_DOWN, 1, *down, published=Names("kv_a_proj_with_mqa")),
            **linear("kv_up", self.kv_up, Role.LATENT_UP, self.n_heads, *up, published=Names("kv_b_proj")),
            **linear("o_proj", self.o_proj, Role.RESIDUAL_OUTPUT, published=Names("o_proj")),
            **linear("k_rope_proj", self.k_rope_proj, Role.KEY, 1, Part("k_rope", self.rope_dim)),
            **nested("kv_norm", self.kv_norm, Names("kv_a_layernorm")),
            **nested("q_norm", self.q_norm),
            **nested("q_nope_norm", self.q_nope_norm),
            **nested("q_rope_norm", self.q_rope_norm),
            **nested("k_rope_norm", self.k_rope_norm),
            **nested("k_nope_norm", self.k_nope_norm),
            **nested("indexer", self.indexer, Names("indexer")),
        }

    def _query_layout(self, parts: tuple[Part, ...]) -> dict[str, ParamLayout]:
        if isinstance(self.q_proj, Linear):
            return linear("q_proj", self.q_proj, Role.QUERY, self.n_heads, *parts, published=Names("q_proj"))
        down, norm, up = self.q_proj
        return {
            **linear("q_proj.down", down, Role.LATENT_DOWN, published=Names("q_a_proj")),
            **linear("q_proj.up", up, Role.QUERY, self.n_heads, *parts, published=Names("q_b_proj")),
            **nested("q_proj.norm", norm, Names("q_a_layernorm")),
        }

    def _naive(self, given: Projected, ctx: Context, cache: Cache | None) -> Heads:
        k, v = self._expand(given.row)
        core = self.core_of(given.index)
        return core(torch.cat((given.q_nope, given.q_rope), -1), {"k": k, "v": v}, ctx, cache)

    def _expanded(self, given: Projected, ctx: Context, cache: Cache | None) -> Heads:
        # inv is for the cache alone: _expand norms keys by itself
        entries = {"latent_and_k_rope": given.row} if cache is None else self._cache_entries(given.row)
        core = self.core_of(given.index)
        return core(torch.cat((given.q_nope, given.q_rope), -1), entries, ctx, cache, self._expand)

    def _absorbed(self, given: Projected, ctx: Context, cache: Cache | None) -> Heads:
        w_uk, w_uv = self.up_per_head()
        q_nope = given.q_nope
        if self.k_nope_norm is not None:
            q_nope = (q_nope * self.k_nope_norm.weight).to(given.row.dtype)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, w_uk), given.q_rope), -1)  # (B, T, H, c + r)
        # The row serves as value too, without a copy; its rope columns are dropped from the output.
        v_dim = None if self.caches_inverse else self.rank
        core = self.core_of(given.index)
        heads = core(q, self._cache_entries(given.row), ctx, cache, self._latent_keys, v_dim)
        return heads._replace(out=torch.einsum("bthc,hvc->bthv", heads.out[..., : self.rank], w_uv))

    def _cheaper(self, given: Projected, ctx: Context, cache: Cache | None) -> Heads:
        few = cache is not None and given.row.shape[1] <= self.break_even
        absorb = few or (given.index is not None and given.index.gathers(ctx, cache))
        return (self._absorbed if absorb else self._expanded)(given, ctx, cache)

    def _latent_keys(self, row: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Absorbed keys (B, S, G, c + r) of rows (B, S, 1, c + r) and their inv (B, S, G, 1); and the values, the rows
        themselves, where these are not columns of the keys."""
        if inverse is None:
            return row, None
        row = row.expand(-1, -1, self.key_groups, -1)
        key = row * inverse
        if self.k_nope_norm is not None:
            key = torch.cat((key[..., : self.rank], row[..., self.rank :]), -1)
        return key, row

    def _expand(self, row: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Project latents up: (B, S, 1, c + r) -> keys (B, S, H, n + r) and values (B, S, H, v)."""
        latent = row[..., 0, : self.rank]
        k_nope, v = self.kv_up(latent).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], -1)
        if self.k_nope_norm is not None:
            k_nope = self.k_nope_norm(k_nope)
        k = self._with_rope_key(k_nope, row)
        return unit_rms(k, self.key_groups) if self.whole_keys else k, v

    def _with_rope_key(self, k_nope: Tensor, row: Tensor) -> Tensor:
        """Append the rope key of a row (B, S, 1, c + r) to the k_nope (B, S, H, n) of each head."""
        return torch.cat((k_nope, row[..., self.rank :].expand(-1, -1, self.n_heads, -1)), -1)

    def _cache_entries(self, row: Tensor) -> dict[str, Tensor]:
        """Entries of these tokens for the latent KV cache. inv needs their k_nope, which is computed for it alone."""
        if not self.caches_inverse:
            return {"latent_and_k_rope": row}
        w_uk, _ = self.up_per_head()
        k = F.linear(row[..., 0, : self.rank], w_uk.flatten(0, 1)).unflatten(-1, (self.n_heads, -1))
        if self.whole_keys:
            k = self._with_rope_key(k, row)
        return {"latent_and_k_rope": row, "inverse_rms": inverse_rms(k, self.key_groups)[..., None].to(row.dtype)}

    def up_per_head(self) -> tuple[Tensor, Tensor]:
        """Split kv_up into W_uk (H, n, c) and W_uv (H, v, c)."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)


def break_even(rank: int, head_rows: int) -> float:
    """The number of queries up to which absorbed execution costs less than expanded, for a long cache.

    With c = rank, and n + v = head_rows, the rows of kv_up per head: for each visible token and head, expanding costs
    c(n + v) products, however many queries there are, and absorbing 2c - n - v more per query.
    """
    extra = 2 * rank - head_rows
    return rank * head_rows / extra if extra > 0 else math.inf
