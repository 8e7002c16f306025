"""Positional encodings: the settings of an attention for them, and those other than RoPE (model/rope.py): ALiBi, a bias
that grows with the distance, and learned and sinusoidal position embeddings."""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.settings import Change, FrozenSettings
from model.dimensions import MAX_SIZE, Dimensions
from model.layout import Kind, ParamLayout, Role, leaf
from model.mask import Mask
from model.rope import FROM_CONTEXT, Layout, Rope, Scaling

Position = Literal["rope", "alibi", "none"]
Slopes = Literal["published", "geometric"]
ALIBI_COLUMNS = 8  # ALiBi adds to q and k; it needs two, but fused kernels want multiples of 8
MIN_ORIGINAL_CONTEXT = 7  # tokens; the fastest pair of RoPE turns once in 2π of them
MAX_BF16_INTEGER = 256  # bfloat16 holds all integers up to here


class PositionConfig(FrozenSettings):
    """Positional settings that every attention has."""

    position: Position
    alibi_slopes: Slopes
    rope_theta: float = Field(ge=1)
    rope_layout: Layout
    rope_scaling: Annotated[Scaling, Change.FINE_TUNING]
    # Texts become this many times longer:
    rope_factor: Annotated[float | None, Change.FINE_TUNING] = Field(ge=1, le=MAX_SIZE)
    # Of yarn and llama3; unset: context_length / rope_factor:
    rope_original_context: Annotated[int | None, Change.FINE_TUNING] = Field(ge=MIN_ORIGINAL_CONTEXT, le=MAX_SIZE)

    @model_validator(mode="after")
    def _positions_make_sense(self) -> Self:
        scaling, factor = self.rope_scaling, self.rope_factor
        if self.alibi_slopes == "geometric" and self.position != "alibi":
            raise ValueError(
                f"alibi_slopes=geometric is of position=alibi, and position={self.position} has no slopes: "
                "choose position=alibi, or leave it out"
            )
        if scaling != "none" and self.position != "rope":
            raise ValueError(
                f"rope_scaling={scaling} scales a rotation, and position={self.position} has none: choose position=rope"
            )
        if scaling != "none" and factor is None:
            raise ValueError(f"rope_scaling={scaling} needs a factor: set attention.rope_factor, as in 4")
        if scaling == "none" and factor is not None:
            raise ValueError(
                f"rope_factor={factor} does nothing with rope_scaling=none: choose linear, ntk, yarn or llama3"
            )
        if scaling not in FROM_CONTEXT and self.rope_original_context is not None:
            raise ValueError(
                f"rope_original_context={self.rope_original_context} is what yarn and llama3 begin from, "
                f"and rope_scaling={scaling} does not ask: choose one of these, or leave it unset"
            )
        if scaling in FROM_CONTEXT and self.rope_theta == 1:
            raise ValueError(
                f"rope_theta=1 turns all pairs alike, which leaves {scaling} no choice: choose a larger one"
            )
        return self

    def check_rotated(self, name: str, dim: int) -> None:
        """Raise ValueError if RoPE cannot rotate `dim` dimensions; `name` is the setting they come from."""
        if dim % 2:
            raise ValueError(f"{name}={dim} is odd: RoPE rotates pairs, choose an even one")
        if dim == 2 and self.rope_scaling == "ntk":
            raise ValueError(f"{name}={dim} is one pair, which rope_scaling=ntk leaves as it is: choose linear or yarn")

    def original_context(self, dimensions: Dimensions) -> int | None:
        """Derive an unset rope_original_context, which YaRN and Llama 3 have: context_length / rope_factor."""
        if self.rope_scaling not in FROM_CONTEXT or self.rope_original_context is not None:
            return self.rope_original_context
        return min(MAX_SIZE, max(MIN_ORIGINAL_CONTEXT, round(dimensions.context_length / self.rope_factor)))

    def rope(self, dim: int) -> Rope | None:
        """Build the RoPE for `dim` coordinates of queries and keys; None without. Call it on a derived config."""
        if self.position != "rope":
            return None
        factor = 1.0 if self.rope_factor is None else self.rope_factor
        return Rope(dim, self.rope_theta, self.rope_layout, self.rope_scaling, factor, self.rope_original_context)

    @property
    def softmax_scale_factor(self) -> float:
        """Factor of the softmax scale: mscale² with yarn, where mscale = 0.1 ln(factor) + 1 and at least 1
        (arXiv:2309.00071, section 3.4). Multiplying cos and sin by mscale is the same if the whole head rotates.
        """
        if self.rope_scaling != "yarn":
            return 1.0
        return (0.1 * math.log(max(1.0, self.rope_factor)) + 1) ** 2

    @property
    def bias_columns(self) -> int:
        """Columns that position_bias adds to queries and keys."""
        return ALIBI_COLUMNS if self.position == "alibi" else 0

    def position_bias(self, causal: bool) -> "PositionBias":
        """Return the function (q, k, mask, scale) -> BiasedQK that adds the position bias to the scores."""
        if self.position != "alibi":
            return no_position_bias
        if not causal:
            raise ValueError("position=alibi is for causal models: its bias is no distance where later tokens are seen")
        return functools.partial(alibi, rule=self.alibi_slopes)


class BiasedQK(NamedTuple):
    """Queries and keys whose products include the position bias, up to a term that softmax ignores."""

    q: Tensor
    k: Tensor
    row_offset: Tensor | float  # (B or 1, T, H) left out of the scores: the same for all keys of a query


PositionBias = Callable[[Tensor, Tensor, Mask, float], BiasedQK]  # (q, k, mask, scale)


def slopes(heads: int, rule: Slopes = "published", device: torch.device | None = None) -> Tensor:
    """Slopes of ALiBi's heads, (H,) float32: 2^(-8i/H) for head i in 1..H, if H is a power of two.

    published: for any other H, the slopes for the next lower power of two n, followed by every other slope for 2n,
    2^(-8(2j - 1)/2n) for j = 1..H - n, as in the paper's code (github.com/ofirpress/attention_with_linear_biases), in
    BLOOM and in MPT. geometric: 2^(-8i/H) for every H.
    """
    i = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    if rule == "geometric":
        return torch.exp2(-8 / heads * i)
    n = 1 << (heads.bit_length() - 1)
    return torch.exp2(-8 / n * torch.where(i <= n, i, i - n - 0.5))


def alibi(q: Tensor, k: Tensor, mask: Mask, scale: float, rule: Slopes = "published") -> BiasedQK:
    """ALiBi, attention with linear biases (Press et al. 2022, arXiv:2108.12409): scores - m (q_pos - k_pos), with the
    `slopes` m, one per head.

    q (B, T, H, D), k (B, S, G, D) -> both 8 wider, so that any kernel computes the bias as a part of q · k. Softmax
    ignores what is the same for all keys of a query, so q_pos may be replaced by any value that does not depend on the
    key; here by the last query's position, which keeps the bias small for the keys nearby. The distance from there is
    split as 256 · hi + lo, so that bfloat16 holds it exactly up to 65,536:

        scale · (q · k + (256 m / scale) (-hi) + (m / scale) (-lo))  =  scale · q · k - m (last - k_pos)

    Key positions come with the mask, so a KV cache stores nothing more. Padding gets a bias too, which the mask hides.
    """
    m = slopes(q.shape[2], rule, q.device)  # (H,)
    factor = m / scale
    last = mask.q_pos.amax(1, keepdim=True)  # (B or 1, 1)
    distance = last - mask.k_pos  # (B or 1, S)
    high = distance.div(MAX_BF16_INTEGER, rounding_mode="floor")
    factors = torch.stack((MAX_BF16_INTEGER * factor, factor), -1).to(q.dtype)  # (H, 2)
    digits = -torch.stack((high, distance - MAX_BF16_INTEGER * high), -1).to(k.dtype)  # (B or 1, S, 2)
    return BiasedQK(_widen(q, factors), _widen(k, digits[:, :, None]), m * (last - mask.q_pos)[..., None])


def no_position_bias(q: Tensor, k: Tensor, mask: Mask, scale: float) -> BiasedQK:
    """Leave the scores as they are: RoPE and position embeddings need no bias."""
    return BiasedQK(q, k, 0.0)


def _widen(x: Tensor, columns: Tensor) -> Tensor:
    """Append columns: x (B, S, H, D) and columns that broadcast to (B, S, H, 2) -> (B, S, H, D + 8)."""
    return torch.cat((x, F.pad(columns, (0, ALIBI_COLUMNS - columns.shape[-1])).expand(*x.shape[:3], -1)), dim=-1)


class Learned(nn.Module):
    """Learned position embedding, one vector per position of the context. It is initialised and decayed like the token
    embedding."""

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dimensions.context_length, dimensions.d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) -> (B, T, d); padding gets position 0. Raises ValueError for a text longer than the context."""
        context = self.weight.shape[0]
        if positions.shape[1] > context:
            raise ValueError(
                f"{positions.shape[1]} tokens are more than the context_length={context} that has learned positions: "
                "give fewer, or train with position_embedding=sinusoidal"
            )
        return F.embedding(positions.clamp(min=0), self.weight)

    def layout(self) -> dict[str, ParamLayout]:
        return leaf(self, Role.POSITION, Kind.TABLE)


class Sinusoidal(nn.Module):
    """Sinusoidal position embedding: sin and cos of position · 10000^(-2i/d), at columns 2i and 2i + 1 (Vaswani et al.
    2017, arXiv:1706.03762, section 3.5), divided by sqrt(d). The paper multiplies the token embedding by sqrt(d)
    instead, which differs by a factor that the norms ahead of the layers remove."""

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.d_model = dimensions.d_model

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) -> (B, T, d) in float32, for texts of any length; padding gets position 0."""
        pairs = torch.arange(0, self.d_model, 2, device=positions.device, dtype=torch.float32)
        angles = positions.clamp(min=0)[..., None].float() * 10000.0 ** (-pairs / self.d_model)  # (B, T, d/2)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return waves[..., : self.d_model] * self.d_model**-0.5


EMBEDDINGS = {"learned": Learned, "sinusoidal": Sinusoidal}


def position_embedding(dimensions: Dimensions) -> nn.Module | None:
    """Build the position embedding, (B, T) positions -> (B, T, d) to add to the token embedding; None without one."""
    if dimensions.position_embedding == "none":
        return None
    return EMBEDDINGS[dimensions.position_embedding](dimensions)
