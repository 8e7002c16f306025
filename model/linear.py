"""Linear layer whose bias may stay in float32 beside a low-precision weight; several layers of one input at once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined(NamedTuple):
    """Weights of several layers in one matrix, of which each is some rows."""

    weight: Tensor  # (sum of the layers' outputs, in)
    bias: Tensor | None  # zeros for a layer without one
    sizes: list[int]  # outputs of each layer

    def holds(self, first: "Linear") -> bool:
        """Whether the weights of the first layer are here still, and were not moved or converted."""
        return self.weight.data_ptr() == first.weight.data_ptr()


class Linear(nn.Linear):
    """x · weightᵀ + bias, in the dtype of x, which is the weight's. Mixed precision copies matrices to bfloat16 and
    leaves the bias in float32: it is rounded where it is added, and its gradient is float32."""

    joined: Joined | None = None  # of the layers that this one is the first of; set by `join`

    def reset_parameters(self) -> None:
        """Draw nothing: model.initialise does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


@torch.no_grad()
def join(*layers: Linear) -> None:
    """Store the weights of layers of one input in one matrix, by columns, of which they become views; biases alike."""
    weight = torch.cat([layer.weight.mT for layer in layers], dim=1).mT
    sizes = [layer.out_features for layer in layers]
    biases = [layer.bias for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        zeros = next(b for b in biases if b is not None).new_zeros(max(sizes))
        bias = torch.cat([zeros[:size] if b is None else b for b, size in zip(biases, sizes, strict=True)])
        for b, part in zip(biases, bias.split(sizes), strict=True):
            if b is not None:
                b.data = part
    for layer, rows in zip(layers, weight.split(sizes), strict=True):
        layer.weight.data = rows
    layers[0].joined = Joined(weight, bias, sizes)


def apply_each(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Apply several layers to one input: in one product, where they were joined and nothing is to be differentiated."""
    joined = layers[0].joined
    if joined is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not joined.holds(layers[0]):
        return tuple(layer(x) for layer in layers)
    return F.linear(x, joined.weight, None if joined.bias is None else joined.bias.to(x.dtype)).split(joined.sizes, -1)
