"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), the rotation of queries and keys by their position."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rope:
    """Rotates pairs of coordinates by position · theta^(-2i/dim).

    The layout says which coordinates make pair i: `half` takes (i, i + dim/2) as Llama does, `interleaved` takes
    (2i, 2i + 1) as the paper and DeepSeek do. The two are one model up to a permutation of weight rows.
    """

    dim: int
    theta: float
    layout: Layout

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T) -> cos, sin, each (B, T, 1, dim/2) in float32: bfloat16 loses positions beyond 256."""
        exponents = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float32) / self.dim
        angles = positions[..., None, None].float() * self.theta**-exponents
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, H, dim) -> the same shape and dtype, rotated in float32."""
        cos, sin = table
        if self.layout == "half":
            a, b = x.float().chunk(2, dim=-1)
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return rotated.to(x.dtype)
