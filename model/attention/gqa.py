"""Multi-head, multi-query and grouped-query attention: one class that differs in the number of KV heads.

MHA (Vaswani et al. 2017, arXiv:1706.03762) has as many KV heads as query heads, MQA (Shazeer 2019,
arXiv:1911.02150) has one, GQA (Ainslie et al. 2023, arXiv:2305.13245) a divisor in between.
"""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from model.attention.base import divisors, grouped_kv_heads, head_dim_of
from model.attention.core import Heads
from model.attention.indexed import IndexedAttention, IndexedConfig
from model.cache import Cache
from model.context import Context
from model.dimensions import Dimensions, Size
from model.flat_step import FlatAttention, Now
from model.kernels.base import Kernel
from model.kernels.sdpa import attend_to_all
from model.layout import Names, ParamLayout, Part, Role, linear, nested
from model.linear import Linear
from model.norm import RMS_EPS, RMSNorm, are_plain, rms_normer


class GQAConfig(IndexedConfig):
    n_kv_heads: Size | Literal["all"] | None  # unset: the smallest divisor of n_heads >= n_heads/4, and 2
    head_dim: Size | None  # unset: d_model / n_heads
    qk_norm: bool | None  # RMSNorm on each query and key head, before RoPE; unset: model.qk_norm
    v_bias: bool | None  # bias on v_proj; unset: model.bias
    rope_dim: Size | None  # leading dimensions of each head that rotate (partial RoPE); unset: head_dim

    def derive(self, dimensions: Dimensions) -> Self:
        n_heads = dimensions.n_heads
        head_dim = self.head_dim or head_dim_of(dimensions)
        n_kv_heads = n_heads if self.n_kv_heads == "all" else self.n_kv_heads or grouped_kv_heads(n_heads)
        if n_heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}: "
                f"choose one of {', '.join(map(str, divisors(n_heads)))}"
            )
        return self.model_copy(
            update={
                **self.of_model(dimensions),
                "n_kv_heads": n_kv_heads,
                "head_dim": head_dim,
                "rope_dim": self._rope_dim(head_dim),
                "qk_norm": dimensions.qk_norm if self.qk_norm is None else self.qk_norm,
                "v_bias": dimensions.bias if self.v_bias is None else self.v_bias,
                "indexer": self.derived_indexer(dimensions),
            }
        )

    def _rope_dim(self, head_dim: int) -> int | None:
        if self.position != "rope":
            if self.rope_dim is not None:
                raise ValueError(
                    f"rope_dim={self.rope_dim} rotates, and position={self.position} does not: choose position=rope"
                )
            return None
        if self.rope_dim is None:
            self.check_rotated("head_dim", head_dim)
            return head_dim
        self.check_rotated("rope_dim", self.rope_dim)
        if self.rope_dim > head_dim:
            raise ValueError(f"rope_dim={self.rope_dim} is more than head_dim={head_dim}: choose at most that")
        return self.rope_dim

    def build(self, dimensions: Dimensions, kernel: Kernel, causal: bool = True) -> "GQA":
        return GQA(self, dimensions, kernel, causal)

    @property
    def cache_elements(self) -> int:
        return 2 * self.n_kv_heads * self.head_dim + self.index_elements

    def qk_clip_obstacle(self) -> str | None:
        if self.qk_norm:
            return "attention.qk_norm=true undoes any scaling of queries and keys: set it to false"
        return super().qk_clip_obstacle()

    def describe(self, n_heads: int) -> str:
        chosen = self.described_indexer
        if self.n_kv_heads == n_heads:
            return f"MHA, {n_heads} heads with a key and a value each{chosen}"
        if self.n_kv_heads == 1:
            return f"MQA, {n_heads} heads on one key and value head{chosen}"
        return f"GQA, {n_heads} heads on {self.n_kv_heads} key and value heads{chosen}"


class GQA(IndexedAttention):
    """y = softmax(q kᵀ / sqrt(head_dim)) v, each KV head shared by n_heads / n_kv_heads query heads."""

    def __init__(self, config: GQAConfig, dimensions: Dimensions, kernel: Kernel, causal: bool):
        super().__init__()
        d_model, n_heads = dimensions.d_model, dimensions.n_heads
        self.head_dim = config.head_dim
        self.n_kv_heads = config.n_kv_heads
        self.core = config.core(kernel, causal, config.head_dim)
        self.rope = config.rope(config.rope_dim)
        self.indexer = config.build_indexer(d_model, d_model, config.rope_dim or 0)
        self.macs_per_pair = n_heads * (2 * config.head_dim + config.bias_columns) + self.index_macs_per_pair
        # Without RoPE or a norm behind it, a key bias adds the same to all scores of a query, which softmax ignores.
        k_bias = config.qk_bias and (self.rope is not None or config.qk_norm)
        self.q_proj = Linear(d_model, n_heads * config.head_dim, dimensions.bias or config.qk_bias)
        self.k_proj = Linear(d_model, config.n_kv_heads * config.head_dim, dimensions.bias or k_bias)
        self.v_proj = Linear(d_model, config.n_kv_heads * config.head_dim, config.v_bias)
        self.q_norm = _head_norm(config, dimensions)
        self.k_norm = _head_norm(config, dimensions)
        self.o_proj = Linear(n_heads * config.head_dim, d_model, dimensions.bias)

    def of_one_input(self) -> tuple[Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def heads(self, x: Tensor, ctx: Context, cache: Cache | None, carried: Any) -> Heads:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.apply_each(x))
        q = ctx.rotated(self.q_norm(q), self.rope)  # (B, T, H, D)
        k = ctx.rotated(self.k_norm(k), self.rope)  # (B, T, G, D)
        return self.core_of(self.index(x, x, ctx))(q, {"k": k, "v": v}, ctx, cache)

    def flat(self, cache: Cache) -> FlatAttention | None:
        joined = self.joined()
        ours = type(self) is GQA and self.indexer is None and are_plain(self.q_norm, self.k_norm)
        if joined is None or not (ours and self.is_plain(cache)):
            return None
        keys, values = cache.by_head("k"), cache.by_head("v")
        batch, n_kv_heads, _, head_dim = keys.shape
        n_heads, scale, rope = self.o_proj.in_features // head_dim, self.core.scale, self.rope
        project, output = joined.multiplier(batch), self.o_proj.multiplier(batch)
        norm = None
        if isinstance(self.q_norm, RMSNorm):
            weights = self.q_norm.weight.expand(n_heads, -1), self.k_norm.weight.expand(n_kv_heads, -1)
            norm = rms_normer(torch.cat(weights), self.q_norm.eps)

        def attend(x: Tensor, residual: Tensor, now: Now) -> Tensor:
            y = project(x, None).view(batch, -1, head_dim)
            q_and_k = y[:, : n_heads + n_kv_heads]
            if norm is not None:
                q_and_k = norm(q_and_k)
            if rope is not None:
                q_and_k = rope.rotate(q_and_k, now.rotary[rope])
            keys[:, :, now.row].copy_(q_and_k[:, n_heads:, None])
            values[:, :, now.row].copy_(y[:, -n_kv_heads:, None])
            q = q_and_k[:, :n_heads].reshape(batch, n_kv_heads, -1, head_dim)
            heads = attend_to_all(q, keys[:, :, now.seen], values[:, :, now.seen], scale)
            return output(heads.reshape(batch, -1), residual)

        return attend

    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        head = (self.n_kv_heads, self.head_dim)
        columns = {"k": head, "v": head} | self.index_column
        return self.core.make_cache(batch_size, capacity, columns, like=self.k_proj.weight)

    def layout(self) -> dict[str, ParamLayout]:
        n_heads, head_dim = self.o_proj.in_features // self.head_dim, self.head_dim
        q, k, v = Part("q", head_dim, clip_power=0.5), Part("k", head_dim, clip_power=0.5), Part("v", head_dim)
        return {
            **linear("q_proj", self.q_proj, Role.QUERY, n_heads, q, published=Names("q_proj", "c_attn")),
            **linear("k_proj", self.k_proj, Role.KEY, self.n_kv_heads, k, published=Names("k_proj", "c_attn")),
            **linear("v_proj", self.v_proj, Role.VALUE, self.n_kv_heads, v, published=Names("v_proj", "c_attn")),
            **linear("o_proj", self.o_proj, Role.RESIDUAL_OUTPUT, published=Names("o_proj", "c_proj")),
            **nested("q_norm", self.q_norm, Names("q_norm")),
            **nested("k_norm", self.k_norm, Names("k_norm")),
            **nested("indexer", self.indexer, Names("indexer")),
        }


def _head_norm(config: GQAConfig, dimensions: Dimensions) -> nn.Module:
    return RMSNorm(config.head_dim, dimensions.norm_eps or RMS_EPS) if config.qk_norm else nn.Identity()
