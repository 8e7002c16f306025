"""Linear layer whose bias may stay in float32 beside a low-precision weight; several layers of one input at once."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x · weightᵀ + bias, in the dtype of x, which is the weight's. Mixed precision copies matrices to bfloat16 and
    leaves the bias in float32: it is rounded where it is added, and its gradient is float32."""

    def reset_parameters(self) -> None:
        """Draw nothing: model.initialise does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class Joined(NamedTuple):
    """The weights of several layers in one matrix, of which each is some rows."""

    layers: tuple[Linear, ...]
    weight: Tensor  # (sum of the layers' outputs, in)
    bias: Tensor | None  # zeros for a layer without one
    addresses: list[int]

    def are(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether these are the layers, as they were joined: none moved, converted, replaced or hooked."""
        return layers == self.layers and self.addresses == _addresses(layers) and not any(map(_has_hooks, layers))


class FanOut(nn.Module):
    """A module that applies several layers to one input, which decoding does in one product."""

    _joined: Joined | None = None

    def of_one_input(self) -> tuple[Linear, ...]:
        """The layers that `apply_each` applies."""
        return ()

    def apply_each(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each layer: of one product, where they were joined and nothing is to be differentiated."""
        layers, joined = self.of_one_input(), self._joined
        if joined is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not joined.are(layers):
            return tuple(layer(x) for layer in layers)
        y = F.linear(x, joined.weight, None if joined.bias is None else joined.bias.to(x.dtype))
        return y.split([layer.out_features for layer in layers], -1)

    @torch.no_grad()
    def join(self) -> tuple[Linear, ...]:
        """Store the weights of the layers in one matrix, of which they become views; biases alike. Returns the layers
        that were joined: none where one of them was replaced by a module of another kind."""
        layers = self.of_one_input()
        if not layers or not all(isinstance(layer, Linear) for layer in layers):
            return ()
        weight = read_fast(torch.cat([layer.weight for layer in layers]))
        sizes = [layer.out_features for layer in layers]
        for layer, rows in zip(layers, weight.split(sizes), strict=True):
            layer.weight.data = rows
        biased = [layer for layer in layers if layer.bias is not None]
        bias = None
        if biased:
            zeros = biased[0].bias.new_zeros(max(sizes))
            bias = torch.cat([zeros[: layer.out_features] if layer.bias is None else layer.bias for layer in layers])
            for layer, part in zip(layers, bias.split(sizes), strict=True):
                if layer.bias is not None:
                    layer.bias.data = part
        self._joined = Joined(layers, weight, bias, _addresses(layers))
        return layers


def read_fast(matrix: Tensor) -> Tensor:
    """The matrix (out, in), stored so that a product with one row reads the longer runs: see model/decode_layout.py."""
    return matrix.mT.contiguous().mT if matrix.shape[0] > matrix.shape[1] else matrix.contiguous()


def _addresses(layers: Iterable[nn.Module]) -> list[int]:
    return [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
