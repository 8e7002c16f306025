"""The contract of an attention, and what every layer may know of a forward pass."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.settings import FrozenSettings
from model.cache import Cache
from model.dimensions import LARGEST, Dimensions, Size
from model.kernels.base import Kernel
from model.layout import MatrixLayout
from model.mask import Mask, Pattern
from model.positions import PositionConfig
from model.rope import Rope


@dataclass(frozen=True)
class Context:
    """What every layer may know of this forward pass. Built once by TransformerLM; layers only read it."""

    positions: Tensor  # (B, T) or (1, T): tokens from the start of their document; negative is padding
    contiguous: bool  # positions are 0..T-1 and nothing was cached before: stated by whoever made them
    kv_len: int | None  # cache rows that may be visible, rounded up in buckets; None is all
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]  # float32 cos and sin, one entry per distinct Rope
    docs: Tensor | None = None  # (B, T) document of each token, where several are packed into a sequence
    training: bool = False  # dropout is on
    collect: frozenset[str] = frozenset()  # names of what layers shall say besides

    def dropped(self, probability: float) -> float:
        """The probability to drop with now: none outside training."""
        return probability if self.training else 0.0

    def drop(self, x: Tensor, probability: float) -> Tensor:
        """Dropout (Srivastava et al. 2014), which leaves x alone outside training."""
        return F.dropout(x, probability) if self.training and probability else x

    def rotated(self, x: Tensor, rope: Rope | None) -> Tensor:
        """x (B, T, H, D), rotated by its tokens' positions if anything rotates it."""
        return x if rope is None else rope.rotate(x, self.rotary[rope])


class AttentionChoice(FrozenSettings, ABC):
    """Dimensions left at None derive from the model's, by the rule each field's comment states."""

    @property
    def executions(self) -> tuple[str, ...]:
        """What a field `execution` may say, where the same parameters run in more than one way."""
        return ()

    def with_execution(self, execution: str) -> Self:
        """The same choice, run in one of its ways."""
        return self.model_copy(update={"execution": execution})

    @abstractmethod
    def derive(self, dimensions: Dimensions) -> Self:
        """The same choice with every dimension filled in. Raises ValueError where they do not fit together."""

    @abstractmethod
    def of_layer(self, index: int) -> "AttentionConfig":
        """What that layer is built of; call it on a derived choice."""

    @abstractmethod
    def qk_clip_obstacle(self) -> str | None:
        """Where scaling the rows that make queries and keys would not scale a head's scores (which QK-clip is for), one
        line that says why, and the way out."""

    @abstractmethod
    def describe(self, n_heads: int) -> str:
        """In the field's words, what its heads share, as in `GQA, 8 heads on 2`; call it on a derived choice."""


class AttentionConfig(AttentionChoice, PositionConfig):
    """One attention, the same in each layer that has it."""

    window: Size | None = None  # keys a query sees, its own included; unset: all before it
    dilation: Size = 1  # within the window, every n-th key
    global_tokens: int = Field(0, ge=0, le=LARGEST)  # the first tokens, which are seen from beyond the window
    random_blocks: float = Field(0.0, ge=0, lt=1)  # share of the blocks beyond the window that are seen
    block_size: Size = 64  # tokens in such a block
    pattern_seed: int = Field(0, ge=0, lt=2**31)  # which ones
    qk_bias: bool = False  # of the matrices that make queries, and keys where it can matter; model.bias is of all
    mask_diagonal: bool = False  # a token does not see itself: to study what it is good for
    dropout: float = Field(0.0, ge=0, lt=1)  # of the attention weights, while training

    @model_validator(mode="after")
    def _pattern_makes_sense(self) -> Self:
        if self.window is None and self.dilation == 1:
            for name in ("global_tokens", "random_blocks"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)} adds to what a window shows, and without one all is seen: "
                        "set attention.window"
                    )
        if self.window is not None and 1 < self.window <= self.dilation:
            raise ValueError(
                f"dilation={self.dilation} leaves a token only itself in window={self.window}: choose a wider window"
            )
        if not self.random_blocks:
            for name in ("block_size", "pattern_seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={getattr(self, name)} is of random blocks: set attention.random_blocks")
        if self.mask_diagonal and not self.global_tokens and (self.window == 1 or self.dilation > 1):
            raise ValueError(
                "mask_diagonal=true leaves some tokens nothing to see with "
                + ("window=1: choose a wider one" if self.window == 1 else f"dilation={self.dilation}: choose 1")
                + ", or set attention.global_tokens=1"
            )
        return self

    def of_layer(self, index: int) -> "AttentionConfig":
        return self

    def qk_clip_obstacle(self) -> str | None:
        if self.position == "alibi":
            return "position=alibi adds to the scores what no scaling of queries and keys changes: choose another"
        return None

    def pattern(self, causal: bool) -> Pattern:
        return Pattern(
            causal=causal,
            window=self.window,
            dilation=self.dilation,
            global_tokens=self.global_tokens,
            random_blocks=self.random_blocks,
            block_size=self.block_size,
            seed=self.pattern_seed,
            see_self=not self.mask_diagonal,
        )

    @abstractmethod
    def build(self, dimensions: Dimensions, kernel: Kernel, causal: bool = True) -> "Attention":
        """The module; call it on a derived config."""

    @property
    @abstractmethod
    def cache_elements(self) -> int:
        """Numbers kept per token and layer while decoding; call it on a derived config."""


class Attention(nn.Module, ABC):
    """A pure function of its input, the context and the cache it is given; it holds weights and nothing else.

    Its last matrix is named `o_proj`: it writes to the residual stream and is initialised accordingly.
    """

    rope: Rope | None  # none where positions reach it otherwise, or not at all
    pattern: Pattern
    macs_per_pair: int  # multiply-adds per query and key in training: heads · (width of keys + width of values)
    extra_macs_per_token: int = 0  # multiply-adds per token beside one application of each matrix; no cache

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context, cache: Cache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, d_model) -> the same shape, and what else this layer has to say. Position i reads no later one."""

    @abstractmethod
    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache on the device and in the dtype of the weights. The caller owns it."""

    @abstractmethod
    def param_layout(self) -> dict[str, MatrixLayout]:
        """The logical matrices within each of its matrices, by parameter name: each head's own, and what is used
        differently (latent and rope key, keys and values) apart. o_proj is one: it adds the heads up to one vector.

        Queries are named q and keys k where all of a head's dimensions are alike, else q_nope, q_rope and k_nope (the
        shared rope key is no head's own): by these names clipping finds what makes a head's logits."""


def update_cache(
    pattern: Pattern, ctx: Context, cache: Cache | None, **fresh: Tensor
) -> tuple[tuple[Tensor, ...], Mask]:
    """Writes `fresh` (B, T, ...) to the cache, if there is one; returns the keys to attend to, and the mask for them.

    Without a cache, and in a plain prefill (nothing was cached before), the keys are the fresh tensors themselves.
    """
    if cache is not None and not ctx.contiguous:
        keys = cache.extend(ctx.positions, ctx.kv_len, **fresh)
        return keys.columns, Mask(ctx.positions, keys.positions, contiguous=False, pattern=pattern)
    if cache is not None:
        cache.write(ctx.positions, **fresh)
    return tuple(fresh.values()), Mask(ctx.positions, ctx.positions, ctx.contiguous, pattern, ctx.docs, ctx.docs)


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def head_dim_of(dimensions: Dimensions) -> int:
    """The rule for an unset head dimension: the heads share the model's width."""
    d_model, n_heads = dimensions.d_model, dimensions.n_heads
    if d_model % n_heads:
        raise ValueError(
            f"d_model={d_model} is not a multiple of n_heads={n_heads}: "
            f"choose n_heads from {', '.join(map(str, divisors(d_model)))}"
        )
    return d_model // n_heads


def grouped_kv_heads(n_heads: int) -> int:
    """The rule for an unset n_kv_heads: the smallest divisor of n_heads that is at least a quarter of it, and 2."""
    return min((g for g in divisors(n_heads) if g >= max(2, n_heads / 4)), default=1)
