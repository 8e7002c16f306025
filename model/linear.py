"""Linear layer whose bias may stay in float32 beside a low-precision weight; several layers of one input at once; and
products of few rows, as decoding has them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16  # up to which a product with a matrix takes about as long as reading it
FEW_WEIGHTS = 1_000_000  # of a matrix that even 8 rows are multiplied with at once, where vectors are wide
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"  # for which PyTorch has fast products of few rows

Multiply = Callable[[Tensor, Tensor | None], Tensor]  # (x (N, in), residual (N, out) to add, or None) -> (N, out)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: (..., in) and (out, in) -> (..., out). F.linear; without gradients on a CPU, of few rows, the
    fastest way to compute it there, by a rule of shapes and of the processor's vectors alone (measured: python -m
    benchmarks.one_row)."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW_ROWS or torch.is_grad_enabled() or not x.is_cpu:
        return F.linear(x, weight, bias)
    return multiplier(weight, bias, rows)(x.reshape(rows, -1), None).view(*x.shape[:-1], -1)


def multiplier(weight: Tensor, bias: Tensor | None, rows: int) -> Multiply:
    """`product` for few rows on a CPU, what it needs made ready, with an addition."""
    multiply = _multiplier(weight, rows)
    if bias is None:
        return multiply
    return lambda x, residual: multiply(x, residual).add_(bias)


def _multiplier(weight: Tensor, rows: int) -> Multiply:
    by_rows = weight.stride(1) == 1
    if weight.dtype != torch.float32:  # of these bfloat16 alone was measured, on one machine
        return _of_vector(weight) if rows == 1 and by_rows else _at_once(weight)
    if rows > 1:
        few = WIDE_VECTORS and (rows <= 4 or (rows <= 8 and weight.numel() < FEW_WEIGHTS))
        return _swapped(weight) if by_rows and not few else _at_once(weight)
    parts = math.gcd(_threads(), weight.shape[1])
    return _at_once(weight) if by_rows or WIDE_VECTORS or parts == 1 else _in_parts(weight, parts)


def _at_once(weight: Tensor) -> Multiply:
    transposed = weight.mT

    def at_once(x: Tensor, residual: Tensor | None) -> Tensor:
        return torch.mm(x, transposed) if residual is None else torch.addmm(residual, x, transposed)

    return at_once


def _of_vector(weight: Tensor) -> Multiply:
    at_once = _at_once(weight)

    def of_vector(x: Tensor, residual: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # which would write the product out as a slow loop of its own
            return at_once(x, residual)
        y = torch.mv(weight, x[0])[None]
        return y if residual is None else y.add_(residual)

    return of_vector


def _swapped(weight: Tensor) -> Multiply:
    def swapped(x: Tensor, residual: Tensor | None) -> Tensor:
        y = (weight @ x.mT).mT
        return y.contiguous() if residual is None else residual + y

    return swapped


def _in_parts(weight: Tensor, parts: int) -> Multiply:
    """For one row, and a matrix stored by columns, which without wide vectors is read in one thread, but the matrices
    of a batch each in its own."""
    batch, at_once = weight.mT.view(parts, -1, weight.shape[0]), _at_once(weight)

    def in_parts(x: Tensor, residual: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # which would write the batch out as a slow loop of its own
            return at_once(x, residual)
        y = torch.bmm(x.view(parts, 1, -1), batch).sum(0)
        return y if residual is None else y.add_(residual)

    return in_parts


def _threads() -> int:
    return torch.get_num_threads()


_threads._dynamo_marked_constant = True  # else torch.compile stops there


class Linear(nn.Linear):
    """x · weightᵀ + bias, in the dtype of x, which is the weight's. Mixed precision copies matrices to bfloat16 and
    leaves the bias in float32: it is rounded where it is added, and its gradient is float32."""

    def reset_parameters(self) -> None:
        """Draw nothing: model.initialise does."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))

    def multiplier(self, rows: int) -> Multiply:
        """`forward` for few rows on a CPU without gradients, made ready."""
        return multiplier(self.weight, None if self.bias is None else self.bias.to(self.weight.dtype), rows)


class Joined(NamedTuple):
    """The weights of several layers in one matrix, of which each is some rows."""

    layers: tuple[Linear, ...]
    weight: Tensor  # (sum of the layers' outputs, in)
    bias: Tensor | None  # zeros for a layer without one
    sizes: list[int]  # rows of each
    addresses: list[int]

    def are(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether these are the layers, as they were joined: none moved, converted, replaced or hooked."""
        same = layers == self.layers and all(type(layer) is Linear for layer in layers)
        return same and self.addresses == _addresses(layers) and not any(map(has_hooks, layers))

    def multiplier(self, rows: int) -> Multiply:
        """All layers for few rows on a CPU without gradients, made ready."""
        return multiplier(self.weight, None if self.bias is None else self.bias.to(self.weight.dtype), rows)


class FanOut(nn.Module):
    """A module that applies several layers to one input, which decoding does in one product."""

    _joined: Joined | None = None

    def of_one_input(self) -> tuple[Linear, ...]:
        """The layers that `apply_each` applies."""
        return ()

    def apply_each(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each layer: of one product, where they were joined and nothing is to be differentiated."""
        joined = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self.joined()
        if joined is None:
            return tuple(layer(x) for layer in self.of_one_input())
        return product(x, joined.weight, None if joined.bias is None else joined.bias.to(x.dtype)).split(
            joined.sizes, -1
        )

    def joined(self) -> Joined | None:
        """The weights of the layers in one matrix, if they were joined and are still those."""
        joined = self._joined
        return joined if joined is not None and joined.are(self.of_one_input()) else None

    @torch.no_grad()
    def join(self, rows: int = 1) -> tuple[Linear, ...]:
        """Store the weights of the layers in one matrix, of which they become views; biases alike. rows: of the
        products to be fast. Returns the layers that were joined: none where one of them was replaced by a module of
        another kind."""
        layers = self.of_one_input()
        if not layers or not all(type(layer) is Linear for layer in layers):
            return ()
        weight = read_fast(torch.cat([layer.weight for layer in layers]), rows)
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
        self._joined = Joined(layers, weight, bias, sizes, _addresses(layers))
        return layers


def read_fast(matrix: Tensor, rows: int) -> Tensor:
    """The matrix (out, in), stored for products with so many rows: see model/decode_layout.py."""
    by_columns = rows == 1 and matrix.dtype == torch.float32 and (matrix.shape[0] > matrix.shape[1] or _threads() > 1)
    return matrix.mT.contiguous().mT if by_columns else matrix.contiguous()


def _addresses(layers: tuple[nn.Module, ...]) -> list[int]:
    return [one.data_ptr() for layer in layers for one in layer._parameters.values() if one is not None]


def has_hooks(layer: nn.Module) -> bool:
    """Whether something waits for the module to run."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
