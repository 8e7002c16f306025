"""How the model knows where a token stands: the settings of an attention about it, and the ways other than rotation
(model/rope.py): a bias that grows with the distance, and vectors added to the token's embedding."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.settings import FrozenSettings
from model.dimensions import LARGEST, Dimensions
from model.mask import Mask
from model.rope import Layout, Rope, Scaling

Position = Literal["rope", "alibi", "none"]
Slopes = Literal["published", "geometric"]
COLUMNS = 8  # added by ALiBi; two hold numbers, but fused kernels want widths that are multiples of 8
SHORTEST = 7  # tokens of an original context in which the fastest pair turns once
DIGIT = 256  # bfloat16 holds whole numbers up to here


class PositionConfig(FrozenSettings):
    """What every attention may be told about positions."""

    position: Position = "rope"
    alibi_slopes: Slopes = "published"
    rope_theta: float = Field(10000.0, ge=1)
    rope_layout: Layout = "half"
    rope_scaling: Scaling = "none"
    rope_factor: float | None = Field(None, ge=1, le=LARGEST)  # how many times longer texts become
    rope_original_context: int | None = Field(None, ge=SHORTEST, le=LARGEST)  # of yarn: context_length / rope_factor

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
            raise ValueError(f"rope_factor={factor} does nothing with rope_scaling=none: choose linear, ntk or yarn")
        if scaling != "yarn" and self.rope_original_context is not None:
            raise ValueError(
                f"rope_original_context={self.rope_original_context} is what yarn begins from, "
                f"and rope_scaling={scaling} does not ask: choose yarn, or leave it unset"
            )
        if scaling == "yarn" and self.rope_theta == 1:
            raise ValueError("rope_theta=1 turns all pairs alike, which leaves yarn no choice: choose a larger one")
        return self

    def check_rotated(self, name: str, dim: int) -> None:
        """Raises ValueError where a rotation cannot have that many dimensions; `name` is what they are set by."""
        if dim % 2:
            raise ValueError(f"{name}={dim} is odd: RoPE rotates pairs, choose an even one")
        if dim == 2 and self.rope_scaling == "ntk":
            raise ValueError(f"{name}={dim} is one pair, which rope_scaling=ntk leaves as it is: choose linear or yarn")

    def original_context(self, dimensions: Dimensions) -> int | None:
        """The rule for an unset rope_original_context."""
        if self.rope_scaling != "yarn" or self.rope_original_context is not None:
            return self.rope_original_context
        return min(LARGEST, max(SHORTEST, round(dimensions.context_length / self.rope_factor)))

    def rope(self, dim: int) -> Rope | None:
        """What rotates `dim` coordinates of queries and keys, if anything does; of a derived config."""
        if self.position != "rope":
            return None
        factor = 1.0 if self.rope_factor is None else self.rope_factor
        return Rope(dim, self.rope_theta, self.rope_layout, self.rope_scaling, factor, self.rope_original_context)

    @property
    def sharpening(self) -> float:
        """What the softmax scale is multiplied by: with yarn mscale², where mscale = 0.1 ln(factor) + 1 and at least 1
        (arXiv:2309.00071, section 3.4). To multiply cos and sin by mscale is the same where a whole head rotates.
        """
        return (0.1 * math.log(max(1.0, self.rope_factor)) + 1) ** 2 if self.rope_scaling == "yarn" else 1.0

    @property
    def bias_columns(self) -> int:
        """Columns that distance_bias adds to queries and keys."""
        return COLUMNS if self.position == "alibi" else 0

    def distance_bias(self, causal: bool) -> Callable[[Tensor, Tensor, Mask, float], "Biased"]:
        """(q, k, mask, scale) -> what kernels shall see."""
        if self.position != "alibi":
            return unbiased
        if not causal:
            raise ValueError("position=alibi is for causal models: its bias is no distance where later tokens are seen")
        return functools.partial(alibi, rule=self.alibi_slopes)


class Biased(NamedTuple):
    q: Tensor
    k: Tensor
    left_out: Tensor | float  # (B or 1, T, H) what the scores lack that is the same for all keys of a query


def slopes(heads: int, rule: Slopes = "published", device: torch.device | None = None) -> Tensor:
    """(H,) float32, the slopes of ALiBi's heads: of head i, of 1..H, 2^(-8i/H) where H is a power of two.

    published: for another H those of the next lower power of two n, and then every other one of those of 2n,
    2^(-8(2j - 1)/2n) for j = 1..H - n, as in the code of the paper (github.com/ofirpress/attention_with_linear_biases),
    of BLOOM and of MPT. geometric: 2^(-8i/H) for every H.
    """
    i = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    if rule == "geometric":
        return torch.exp2(-8 / heads * i)
    n = 1 << (heads.bit_length() - 1)
    return torch.exp2(-8 / n * torch.where(i <= n, i, i - n - 0.5))


def alibi(q: Tensor, k: Tensor, mask: Mask, scale: float, rule: Slopes = "published") -> Biased:
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409): scores + -m (q_pos - k_pos), where the slopes
    m of the heads are `slopes`.

    q (B, T, H, D), k (B, S, G, D) -> both 8 wider, so that any kernel computes the bias as a part of q · k. Softmax
    ignores what is the same for all keys of a query, so q_pos may be replaced by any number that no key changes; here
    by the last position of the queries, which keeps the numbers small where attention looks. The distance from there is
    split as 256 · hi + lo, so that bfloat16 holds it exactly up to 65,536:

        scale · (q · k + (256 m / scale) (-hi) + (m / scale) (-lo))  =  scale · q · k - m (last - k_pos)

    Positions of the keys come with the mask, so a cache holds nothing more. Padding among them gets a bias too, which
    the mask hides.
    """
    m = slopes(q.shape[2], rule, q.device)  # (H,)
    factor, last = m / scale, mask.q_pos.amax(1, keepdim=True)
    distance = last - mask.k_pos  # (B or 1, S)
    high = distance.div(DIGIT, rounding_mode="floor")
    factors = torch.stack((DIGIT * factor, factor), -1).to(q.dtype)  # (H, 2)
    digits = -torch.stack((high, distance - DIGIT * high), -1).to(k.dtype)  # (B or 1, S, 2)
    return Biased(_widen(q, factors), _widen(k, digits[:, :, None]), m * (last - mask.q_pos)[..., None])


def unbiased(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Biased:
    return Biased(q, k, 0.0)


def _widen(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, S, H, D) and columns that broadcast to (B, S, H, 2) -> (B, S, H, D + 8)."""
    return torch.cat((x, F.pad(columns, (0, COLUMNS - columns.shape[-1])).expand(*x.shape[:3], -1)), dim=-1)


class Learned(nn.Module):
    """A vector for each position of the context. It starts as large as the token's own, and decays as that does."""

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dimensions.context_length, dimensions.d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) -> (B, T, d); padding is given the first. Raises ValueError for a text longer than the context."""
        context = self.weight.shape[0]
        if positions.shape[1] > context:
            raise ValueError(
                f"{positions.shape[1]} tokens are more than the context_length={context} that has learned positions: "
                "give fewer, or train with position_embedding=sinusoidal"
            )
        return F.embedding(positions.clamp(min=0), self.weight)


class Sinusoidal(nn.Module):
    """sin and cos of position · 10000^(-2i/d), at columns 2i and 2i + 1 (Vaswani et al. 2017, arXiv:1706.03762, section
    3.5), divided by sqrt(d). The paper multiplies the token's embedding by that instead; the norms ahead of the layers
    do not tell one from the other."""

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.d_model = dimensions.d_model

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) -> (B, T, d) in float32, for texts of any length; padding is given the first."""
        pairs = torch.arange(0, self.d_model, 2, device=positions.device, dtype=torch.float32)
        angles = positions.clamp(min=0)[..., None].float() * 10000.0 ** (-pairs / self.d_model)  # (B, T, d/2)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return waves[..., : self.d_model] * self.d_model**-0.5


EMBEDDINGS = {"learned": Learned, "sinusoidal": Sinusoidal}


def position_embedding(dimensions: Dimensions) -> nn.Module | None:
    """What gives (B, T) positions vectors (B, T, d) to add to the embedding, where the model has such a thing."""
    if dimensions.position_embedding == "none":
        return None
    return EMBEDDINGS[dimensions.position_embedding](dimensions)
