"""The position-wise part of a block."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.config import LARGEST, Config, Dimensions


class MLPConfig(Config, ABC):
    d_ff: int | None = Field(None, ge=1, le=4 * LARGEST)  # hidden width; unset, it derives from d_model

    @abstractmethod
    def derive(self, dimensions: Dimensions) -> Self:
        """The same choice with d_ff filled in."""

    @abstractmethod
    def build(self, dimensions: Dimensions) -> nn.Module:
        """The module; call it on a derived config. Its last matrix, to the residual stream, is named `down_proj`."""


class SwiGLUConfig(MLPConfig):
    """d_ff: 8/3 d_model rounded up to a multiple of 32, for as many parameters as a plain MLP of 4 d_model."""

    def derive(self, dimensions: Dimensions) -> Self:
        return self.model_copy(update={"d_ff": self.d_ff or -(-8 * dimensions.d_model // 96) * 32})

    def build(self, dimensions: Dimensions) -> nn.Module:
        return SwiGLU(dimensions.d_model, self.d_ff)


class PlainMLPConfig(MLPConfig):
    """d_ff: 4 d_model."""

    def derive(self, dimensions: Dimensions) -> Self:
        return self.model_copy(update={"d_ff": self.d_ff or 4 * dimensions.d_model})


class ReLU2Config(PlainMLPConfig):
    def build(self, dimensions: Dimensions) -> nn.Module:
        return PlainMLP(dimensions.d_model, self.d_ff, lambda x: F.relu(x).square())


class GELUConfig(PlainMLPConfig):
    def build(self, dimensions: Dimensions) -> nn.Module:
        return PlainMLP(dimensions.d_model, self.d_ff, F.gelu)


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(activation(up x)), with GELU, or with ReLU² (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self, d_model: int, d_ff: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
