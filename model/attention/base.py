"""The contract of an attention, and what every layer may know of a forward pass."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import FullCache
from model.config import Config
from model.kernels.base import Kernel
from model.mask import Mask
from model.rope import Rope


@dataclass(frozen=True)
class Context:
    """What every layer may know of this forward pass. Built once by TransformerLM; layers only read it."""

    positions: Tensor  # (B, T) or (1, T): tokens from the start of their document; negative is padding
    plain: bool  # positions are 0..T-1 and nothing was cached before: stated by whoever made them
    extent: int | None  # cache rows that may be visible, rounded up in buckets; None is all
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]  # float32 cos and sin, one entry per distinct Rope
    docs: Tensor | None = None  # (B, T) document of each token, where several are packed into a sequence
    training: bool = False  # dropout is on

    def drop(self, x: Tensor, probability: float) -> Tensor:
        """Dropout (Srivastava et al. 2014), which leaves x alone outside training."""
        return F.dropout(x, probability) if self.training and probability else x


class AttentionConfig(Config, ABC):
    """Dimensions left at None derive from the model's, by the rule each field's comment states."""

    executions: ClassVar[tuple[str, ...]] = ()  # what a field `execution` may say, where there is more than one way

    @abstractmethod
    def derive(self, d_model: int, n_heads: int) -> Self:
        """The same choice with every dimension filled in. Raises ValueError where they do not fit together."""

    @abstractmethod
    def build(self, d_model: int, n_heads: int, kernel: Kernel) -> "Attention":
        """The module; call it on a derived config."""

    @property
    @abstractmethod
    def cache_elements(self) -> int:
        """Numbers kept per token and layer while decoding; call it on a derived config."""

    @abstractmethod
    def described(self, n_heads: int) -> str:
        """In the field's words, what its heads share, as in `GQA, 8 heads on 2`; call it on a derived config."""


class Attention(nn.Module, ABC):
    """A pure function of its input, the context and the cache it is given; it holds weights and nothing else.

    Its last matrix is named `o_proj`: it writes to the residual stream and is initialised accordingly.
    """

    rope: Rope

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context, cache: FullCache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, d_model) -> the same shape, and what else this layer has to say. Position i reads no later one."""

    @abstractmethod
    def make_cache(self, batch_size: int, capacity: int) -> FullCache:
        """An empty cache on the device and in the dtype of the weights. The caller owns it."""


def through_cache(ctx: Context, cache: FullCache | None, **fresh: Tensor) -> tuple[tuple[Tensor, ...], Mask]:
    """Writes `fresh` (B, T, ...) to the cache, if there is one; returns the keys to attend to, and the mask for them.

    Without a cache, and in a plain prefill (nothing was cached before), the keys are the fresh tensors themselves.
    """
    if cache is not None:
        cache.write(ctx.positions, **fresh)
        if not ctx.plain:
            return cache.read(ctx.extent), Mask(ctx.positions, cache.positions(ctx.extent), plain=False)
    return tuple(fresh.values()), Mask(ctx.positions, ctx.positions, ctx.plain, ctx.docs, ctx.docs)


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def head_dim_of(d_model: int, n_heads: int) -> int:
    """The rule for an unset head dimension: the heads share the model's width."""
    if d_model % n_heads:
        raise ValueError(
            f"d_model={d_model} is not a multiple of n_heads={n_heads}: "
            f"choose n_heads from {', '.join(map(str, divisors(d_model)))}"
        )
    return d_model // n_heads


def grouped_kv_heads(n_heads: int) -> int:
    """The rule for an unset n_kv_heads: the smallest divisor of n_heads that is at least a quarter of it, and 2."""
    return min((g for g in divisors(n_heads) if g >= max(2, n_heads / 4)), default=1)
