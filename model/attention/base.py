"""Base classes of attention variants: configuration and module.

An attention of one's own is a config class and a module, and a file in conf/attention/; docs/own_attention.md adds one:

1. A subclass of AttentionConfig holds its settings; `derive` fills in those that follow from the model's, and `build`
   makes the module.
2. A subclass of Attention makes its projections (model.linear.Linear, since x may be bfloat16 where biases and other
   vectors are float32), a norm or a Rope where it has one, an output matrix `o_proj`, and `config.core(...)`. Its
   `heads` is: project, norm, rotate, core. The core updates the cache, masks, adds the position bias, attends, drops
   weights and collects statistics; the base class multiplies by `o_proj`. Where `of_one_input` names layers that are
   applied to x, and `heads` calls `apply_each(x)`, decoding joins their matrices.
3. `make_cache` names the columns that a token caches, and `layout` describes each parameter (model/layout.py).
4. conf/attention/<name>.yaml has the defaults of its settings, and `_target_`, which names the config class.

The laws (tests/model/attention) then apply to it unasked.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from common.settings import Change, FrozenSettings
from model.attention.core import AttentionCore, Heads
from model.cache import Cache, FullCache
from model.context import Context
from model.dimensions import MAX_SIZE, Dimensions, Size
from model.flat_step import FlatAttention
from model.kernels.base import Kernel
from model.layout import ParamLayout
from model.linear import FanOut, Linear
from model.mask import CAUSAL, Pattern
from model.positions import PositionConfig, no_position_bias
from model.rope import Rope

UNUSED_BLOCKS = {"block_size": 64, "pattern_seed": 0}  # as in conf/; others are refused without random blocks


class AttentionChoice(FrozenSettings, ABC):
    """Attention settings: one attention, or a stack of several. Dimensions left at None derive from the model's, by the
    rule in each field's comment."""

    @property
    def executions(self) -> tuple[str, ...]:
        """Values of the field `execution`, for an attention whose parameters can run in several ways."""
        return ()

    def with_execution(self, execution: str) -> Self:
        """Return these settings with another execution."""
        return self.model_copy(update={"execution": execution})

    @abstractmethod
    def derive(self, dimensions: Dimensions) -> Self:
        """Return these settings with every dimension filled in. Raises ValueError if they do not fit together."""

    @abstractmethod
    def of_layer(self, index: int) -> "AttentionConfig":
        """Return the attention of that layer; call it on derived settings."""

    @abstractmethod
    def qk_clip_obstacle(self) -> str | None:
        """Say in one line why QK-clip cannot work here, and the way out; None if it can. It needs that scaling the rows
        that make a head's queries and keys scales the head's scores."""

    @abstractmethod
    def describe(self, n_heads: int) -> str:
        """Describe the variant and its heads, as in `GQA, 8 heads on 2`; call it on derived settings."""


class AttentionConfig(AttentionChoice, PositionConfig):
    """Settings of one attention, the same in each layer that uses it."""

    # Sliding window: keys a query sees, its own included; unset: all before it. No weight hangs on it
    window: Annotated[Size | None, Change.FINE_TUNING]
    dilation: Size  # within the window, every n-th key
    global_tokens: int = Field(ge=0, le=MAX_SIZE)  # the first tokens, visible from beyond the window
    random_blocks: float = Field(ge=0, lt=1)  # share of the blocks beyond the window that are visible
    block_size: Size  # tokens in a random block
    pattern_seed: int = Field(ge=0, lt=2**31)  # seed of the random blocks
    qk_bias: bool | None  # bias on q_proj, and on k_proj unless softmax ignores it; unset: model.qk_bias
    mask_diagonal: bool  # a token does not see itself: for studies
    # On the attention weights, in training only; unset: model.attention_dropout
    dropout: Annotated[float | None, Change.FINE_TUNING] = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _check_window(self) -> Self:
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
        return self

    @model_validator(mode="after")
    def _check_random_blocks(self) -> Self:
        if not self.random_blocks:
            for name in UNUSED_BLOCKS:
                if getattr(self, name) != UNUSED_BLOCKS[name]:
                    raise ValueError(f"{name}={getattr(self, name)} is of random blocks: set attention.random_blocks")
        return self

    @model_validator(mode="after")
    def _check_diagonal(self) -> Self:
        if self.mask_diagonal and not self.global_tokens and (self.window == 1 or self.dilation > 1):
            raise ValueError(
                "mask_diagonal=true leaves some tokens nothing to see with "
                + ("window=1: choose a wider one" if self.window == 1 else f"dilation={self.dilation}: choose 1")
                + ", or set attention.global_tokens=1"
            )
        return self

    def of_model(self, dimensions: Dimensions) -> dict[str, Any]:
        """Derive the settings that are the model's where they are unset, as an update for model_copy."""
        return {
            "qk_bias": dimensions.qk_bias if self.qk_bias is None else self.qk_bias,
            "dropout": dimensions.attention_dropout if self.dropout is None else self.dropout,
            "rope_original_context": self.original_context(dimensions),
        }

    def of_layer(self, index: int) -> "AttentionConfig":
        return self

    def core(self, kernel: Kernel, causal: bool, key_dim: int) -> AttentionCore:
        """Build what attends. Scores are divided by the square root of key_dim; an absorbed key is wider than that."""
        scale = key_dim**-0.5 * self.softmax_scale_factor
        return AttentionCore(kernel, self.pattern(causal), scale, self.dropout, self.position_bias(causal))

    def qk_clip_obstacle(self) -> str | None:
        if self.position == "alibi":
            return "position=alibi adds to the scores what no scaling of queries and keys changes: choose another"
        return None

    def pattern(self, causal: bool) -> Pattern:
        """Build the mask pattern of these settings."""
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

    @property
    def has_indexer(self) -> bool:
        """Whether an indexer chooses the keys that a query attends to."""
        return False

    @abstractmethod
    def build(self, dimensions: Dimensions, kernel: Kernel, causal: bool = True) -> "Attention":
        """Build the module; call it on a derived config."""

    @property
    @abstractmethod
    def cache_elements(self) -> int:
        """KV cache size in elements per token and layer; call it on a derived config."""


class Attention(FanOut, ABC):
    """Attention layer: a pure function of its input, the context and the KV cache it is given. It owns weights only."""

    core: AttentionCore
    rope: Rope | None  # None with another positional encoding, or none
    macs_per_pair: int  # multiply-adds per query and key in training: heads · (width of keys + width of values)
    extra_macs_per_token: int = 0  # multiply-adds per token, without a cache, beyond applying each matrix once
    auxiliary_losses: Mapping[str, float] = MappingProxyType({})  # weights, by the names of auxiliary outputs

    @property
    def pattern(self) -> Pattern:
        """The mask pattern."""
        return self.core.pattern

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotations in use."""
        return () if self.rope is None else (self.rope,)

    def forward(
        self, x: Tensor, ctx: Context, cache: Cache | None = None, carried: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """x (B, T, d_model) -> the same shape, auxiliary outputs by name, and what the next layer gets as `carried`.
        Causal: no position reads a later one."""
        heads, aux, left = self.heads(x, ctx, cache, carried)
        return self.o_proj(self.modify(heads, x, ctx).flatten(2)), aux, carried if left is None else left

    @abstractmethod
    def heads(self, x: Tensor, ctx: Context, cache: Cache | None, carried: Any) -> Heads:
        """The output of each head, (B, T, H, v), of x (B, T, d_model). carried: what the layer below left, or None."""

    def modify(self, heads: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """Change the output of the heads (B, T, H, v), given the input x of this layer: for a gate, or for what else
        acts between the heads and o_proj, whatever the attention. (Scores are the core's.)"""
        return heads

    def flat(self, cache: Cache) -> FlatAttention | None:
        """`forward` for one token of every row on a CPU, made ready (model/flat_step.py); None if there is none. That
        of a class is of the class alone: a subclass, which may change anything, has its own or none."""
        return None

    def is_plain(self, cache: Cache) -> bool:
        """Whether nothing is asked of this attention that a `flat` would have to know besides its own projections: all
        earlier tokens are seen, by PyTorch's flash kernel."""
        core = self.core
        plain_core = type(core) is AttentionCore and core.add_position_bias is no_position_bias
        sees_all = core.pattern == CAUSAL and isinstance(cache, FullCache)
        return plain_core and sees_all and core.attend.is_flash_on_cpu and type(self.o_proj) is Linear

    @abstractmethod
    def make_cache(self, batch_size: int, capacity: int) -> Cache:
        """Create an empty KV cache on the device and in the dtype of the weights. The caller owns it."""

    @abstractmethod
    def layout(self) -> dict[str, ParamLayout]:
        """Describe every parameter, by its name in this module: see model/layout.py. Where the rows of a matrix are of
        heads, or of parts with different uses (latent and rope key, keys and values), it names them; o_proj is used
        whole, since it sums over the heads. The rows that make a head's scores have a clip_power."""


def divisors(n: int) -> list[int]:
    """All divisors of n in ascending order, in time that grows as sqrt(n)."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def head_dim_of(dimensions: Dimensions) -> int:
    """Default head dimension: d_model / n_heads. Raises ValueError if it is no integer."""
    d_model, n_heads = dimensions.d_model, dimensions.n_heads
    if d_model % n_heads:
        raise ValueError(
            f"d_model={d_model} is not a multiple of n_heads={n_heads}: "
            f"choose n_heads from {', '.join(map(str, divisors(d_model)))}"
        )
    return d_model // n_heads


def grouped_kv_heads(n_heads: int) -> int:
    """Default n_kv_heads of GQA: the smallest divisor of n_heads that is at least n_heads / 4, and at least 2."""
    return min((g for g in divisors(n_heads) if g >= max(2, n_heads / 4)), default=1)
