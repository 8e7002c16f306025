"""Rotary position embedding, RoPE (Su et al. 2021, arXiv:2104.09864): queries and keys rotate by their position. With
linear, NTK and YaRN scaling for texts longer than those trained on."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.upcast import upcast

Layout = Literal["half", "interleaved"]
Scaling = Literal["none", "linear", "ntk", "yarn", "llama3"]
FROM_CONTEXT = ("yarn", "llama3")  # these scalings go by the context that a model was trained on
# YaRN ramps between pairs that make so many turns within the original context; the paper's values for Llama.
BETA_FAST = 32
BETA_SLOW = 1
TURNS_FAST, TURNS_SLOW = 4, 1  # of Llama 3.1, in the same sense


@dataclass(frozen=True)
class Rope:
    """Rotation of pairs of coordinates by position · theta^(-2i/dim).

    The layout says which coordinates make pair i: `half` takes (i, i + dim/2) as Llama does, `interleaved` takes
    (2i, 2i + 1) as the paper and DeepSeek do. The two are one model up to a permutation of weight rows.

    Scaling lets a model read `factor` times the context it was trained on:

        linear   positions / factor (Chen et al. 2023, arXiv:2306.15595)
        ntk      theta · factor^(dim/(dim-2)): the fastest pair turns as before, the slowest factor times slower
        yarn     pairs that turn often within the original context as before, those that do not turn once factor times
                 slower, a ramp in between (Peng et al. 2023, arXiv:2309.00071, section 3.2); the attention multiplies
                 its softmax scale by PositionConfig.softmax_scale_factor
        llama3   the same between 4 turns and 1, the ramp by turns, and no other softmax scale (Llama 3.1,
                 arXiv:2407.21783)
    """

    dim: int
    theta: float
    layout: Layout
    scaling: Scaling = "none"
    factor: float = 1.0
    original_context: int | None = None  # tokens; of FROM_CONTEXT

    def table(self, positions: Tensor, below: int | None = None) -> tuple[Tensor, Tensor]:
        """positions (B, T) -> cos, sin, each (B, T, 1, dim) in float32: bfloat16 loses positions beyond 256. Both
        coordinates of a pair have its angle; the sine of the first is negated. below: a bound of the positions, with
        which their rows are looked up rather than computed."""
        if below is not None and not torch.compiler.is_compiling():
            return tuple(rows[positions] for rows in self.rows(below, positions.device))
        angles = positions[..., None, None].float() * self._frequencies(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.layout == "half":
            return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)

    def rows(self, below: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions below a bound, each (below, 1, dim); made once."""
        return _rows(self, below, device or torch.device("cpu"))

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, H, D) -> the same shape and dtype, its first dim coordinates rotated in float32."""
        cos, sin = table
        if x.shape[-1] > self.dim:
            return torch.cat((self.rotate(x[..., : self.dim], table), x[..., self.dim :]), dim=-1)
        exact = upcast(x)
        return torch.addcmul(exact * cos, self._partners(exact), sin).to(x.dtype)

    def _partners(self, x: Tensor) -> Tensor:
        """For each coordinate, the other one of its pair."""
        if self.layout == "half":
            return x.roll(self.dim // 2, -1)
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    def _frequencies(self, device: torch.device) -> Tensor:
        """(dim/2,) float32, radians per position."""
        theta = self.theta
        if self.scaling == "ntk":
            theta *= self.factor ** (self.dim / (self.dim - 2))
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        frequencies = theta**-exponents
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling in FROM_CONTEXT:
            slowed = self._yarn_ramp(device) if self.scaling == "yarn" else self._llama3_ramp(frequencies)
            return frequencies / self.factor * slowed + frequencies * (1 - slowed)
        return frequencies

    def _yarn_ramp(self, device: torch.device) -> Tensor:
        """(dim/2,) float32, how far each pair is slowed: 0 for the fast ones, 1 for the slow ones."""
        first = max(math.floor(self._pair_that_turns(BETA_FAST)), 0)
        last = min(math.ceil(self._pair_that_turns(BETA_SLOW)), self.dim - 1)
        pairs = torch.arange(self.dim // 2, device=device, dtype=torch.float32)
        return ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)

    def _llama3_ramp(self, frequencies: Tensor) -> Tensor:
        turns = self.original_context * frequencies / (2 * math.pi)
        return ((TURNS_FAST - turns) / (TURNS_FAST - TURNS_SLOW)).clamp(0, 1)

    def _pair_that_turns(self, times: float) -> float:
        """Fractional index i of the pair that turns `times` times: original_context · theta^(-2i/dim) = 2π · times."""
        return self.dim * math.log(self.original_context / (times * 2 * math.pi)) / (2 * math.log(self.theta))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _rows(rope: Rope, below: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rope.table(torch.arange(below, device=device)[None])
    return cos[0], sin[0]
