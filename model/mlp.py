"""MLP (feed-forward network) of a transformer block: SwiGLU, or one hidden layer with ReLU, ReLU² or GELU."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.settings import FrozenSettings
from model.context import Context
from model.dimensions import MAX_SIZE, Dimensions
from model.flat_step import FlatMLP
from model.layout import Names, ParamLayout, Role, linear
from model.linear import FanOut, Linear


class MLPConfig(FrozenSettings, ABC):
    d_ff: int | None = Field(ge=1, le=4 * MAX_SIZE)  # hidden width; unset: derived from d_model
    bias: bool | None  # on its Linears; unset: model.bias

    def derive(self, dimensions: Dimensions) -> Self:
        """Return this config with what is unset filled in."""
        bias = dimensions.bias if self.bias is None else self.bias
        return self.model_copy(update={"d_ff": self.d_ff or self.usual_width(dimensions), "bias": bias})

    @abstractmethod
    def usual_width(self, dimensions: Dimensions) -> int:
        """Of an unset d_ff."""

    def of_layer(self, index: int) -> "MLPConfig":
        """The MLP of one layer. Call it on a derived config."""
        return self

    @abstractmethod
    def build(self, dimensions: Dimensions) -> "MLP":
        """Build the module; call it on a derived config."""


class MLP(nn.Module, ABC):
    """MLP layer: a function of its input and the context."""

    auxiliary_losses: Mapping[str, float] = MappingProxyType({})  # weights, by the names of auxiliary outputs

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, d) -> the same shape, and auxiliary outputs by name."""

    def flat(self, rows: int) -> FlatMLP | None:
        """`forward` for few rows on a CPU, made ready (model/flat_step.py); None if there is none."""
        return None

    @abstractmethod
    def layout(self) -> dict[str, ParamLayout]:
        """Describe every parameter, by its name in this module: see model/layout.py."""


class SwiGLUConfig(MLPConfig):
    """Unset d_ff: 8/3 d_model rounded up to a multiple of 32: as many parameters as a PlainMLP of 4 d_model."""

    def usual_width(self, dimensions: Dimensions) -> int:
        return swiglu_width(dimensions.d_model)

    def build(self, dimensions: Dimensions) -> MLP:
        return SwiGLU(dimensions.d_model, self.d_ff, self.bias)


class PlainMLPConfig(MLPConfig):
    """Unset d_ff: 4 d_model."""

    def usual_width(self, dimensions: Dimensions) -> int:
        return 4 * dimensions.d_model


class ReLUConfig(PlainMLPConfig):
    def build(self, dimensions: Dimensions) -> MLP:
        return PlainMLP(dimensions.d_model, self.d_ff, F.relu, self.bias)


class ReLU2Config(PlainMLPConfig):
    def build(self, dimensions: Dimensions) -> MLP:
        return PlainMLP(dimensions.d_model, self.d_ff, relu2, self.bias)


class GELUConfig(PlainMLPConfig):
    approximate: Literal["none", "tanh"]  # x · Φ(x), or GPT-2's tanh approximation

    def build(self, dimensions: Dimensions) -> MLP:
        activation = partial(F.gelu, approximate=self.approximate)
        return PlainMLP(dimensions.d_model, self.d_ff, activation, self.bias)


class SwiGLU(FanOut, MLP):
    """Gated MLP: down(silu(gate x) · up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias)
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        gate, up = self.apply_each(x)
        return self.down_proj(F.silu(gate) * up), {}

    def flat(self, rows: int) -> FlatMLP | None:
        joined = self.joined()
        if joined is None or type(self.down_proj) is not Linear or type(self) is not SwiGLU:
            return None
        project, down = joined.multiplier(rows), self.down_proj.multiplier(rows)

        def apply(x: Tensor, residual: Tensor) -> Tensor:
            gate, up = project(x, None).chunk(2, -1)
            return down(F.silu(gate).mul_(up), residual)

        return apply

    def of_one_input(self) -> tuple[Linear, ...]:
        return self.gate_proj, self.up_proj

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **linear("gate_proj", self.gate_proj, Role.GATE, published=Names("gate_proj")),
            **linear("up_proj", self.up_proj, Role.UP, published=Names("up_proj")),
            **linear("down_proj", self.down_proj, Role.RESIDUAL_OUTPUT, published=Names("down_proj")),
        }


class PlainMLP(MLP):
    """MLP with one hidden layer, down(activation(up x)): ReLU, ReLU² (So et al. 2021, arXiv:2109.08668) or GELU
    (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, d_model: int, d_ff: int, activation: Callable[[Tensor], Tensor], bias: bool):
        super().__init__()
        self.up_proj = Linear(d_model, d_ff, bias)
        self.down_proj = Linear(d_ff, d_model, bias)
        self.activation = activation

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.down_proj(self.activation(self.up_proj(x))), {}

    def flat(self, rows: int) -> FlatMLP | None:
        if not type(self.up_proj) is type(self.down_proj) is Linear or type(self) is not PlainMLP:
            return None
        up, activation, down = self.up_proj.multiplier(rows), self.activation, self.down_proj.multiplier(rows)
        return lambda x, residual: down(activation(up(x, None)), residual)

    def layout(self) -> dict[str, ParamLayout]:
        return {
            **linear("up_proj", self.up_proj, Role.UP, published=Names("up_proj", "c_fc")),
            **linear("down_proj", self.down_proj, Role.RESIDUAL_OUTPUT, published=Names("down_proj", "c_proj")),
        }


def swiglu_width(d_model: int) -> int:
    """8/3 d_model, rounded up to a multiple of 32."""
    return -(-8 * d_model // 96) * 32


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    if torch.is_grad_enabled():
        return _ReLU2.apply(x)
    positive = F.relu(x)
    return positive.mul_(positive)


class _ReLU2(torch.autograd.Function):
    """max(x, 0)². PyTorch would differentiate the square as 2 · x^1, with an extra power and an extra copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (d_y * positive).mul_(2)
