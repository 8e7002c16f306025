"""Products of rows with the matrix of their group, as the experts of a mixture have them: one kernel for all where
PyTorch has it, a product for each group elsewhere.

Both are an operator of PyTorch's, so that tensors without numbers (the meta device, fake tensors) and torch.compile see
one shape in, one shape out, whatever the sizes of the groups are.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.base import say_once

ALIGNMENT = 16  # bytes: rows of both matrices must begin at multiples


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, in), rows sorted by group; weight (G, out, in); ends (G,) int32, the row after the last of each group ->
    (N, out), each row times its group's weightᵀ. It has gradients for x and weight."""
    return torch.ops.headroom.grouped_product(x, weight, ends)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if has_kernel(x.device.type, x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends)
    y = x.new_empty(len(x), weight.shape[1])
    for matrix, rows in zip(weight, _slices(ends), strict=True):
        torch.mm(x[rows], matrix.mT, out=y[rows])
    return y


def _outer(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """d_y (N, out), x (N, in) -> (G, out, in), of each group the sum of its rows' outer products: the gradient of
    `grouped_product` for the weight."""
    if has_kernel(x.device.type, x.dtype, d_y.shape[1], x.shape[1]):
        return F.grouped_mm(d_y.mT, x, offs=ends)
    d_weight = x.new_empty(len(ends), d_y.shape[1], x.shape[1])
    for matrix, rows in zip(d_weight, _slices(ends), strict=True):
        torch.mm(d_y[rows].mT, x[rows], out=matrix)
    return d_weight


def _slices(ends: Tensor) -> list[slice]:
    numbers = ends.tolist()
    return [slice(start, end) for start, end in zip([0, *numbers[:-1]], numbers, strict=True)]


@functools.cache
def has_kernel(device: str, dtype: torch.dtype, *widths: int) -> bool:
    """Whether PyTorch multiplies groups of matrices of these widths at once, forward and backward. Where it does not,
    that is said once."""
    try:
        if any(width * dtype.itemsize % ALIGNMENT for width in widths):
            raise RuntimeError(f"rows of {min(widths)} or {max(widths)} numbers are no multiples of {ALIGNMENT} bytes")
        y, x = (torch.ones(8, width, device=device, dtype=dtype) for width in widths)
        weight, ends = x.new_ones(1, *widths), torch.tensor([8], device=device, dtype=torch.int32)
        for one, other in ((x, weight.mT), (y, weight), (y.mT, x)):
            F.grouped_mm(one, other, offs=ends)
    except (AttributeError, RuntimeError) as error:  # such as a PyTorch, or a GPU, that has none for this dtype
        if isinstance(error, torch.OutOfMemoryError):
            raise
        name, reason = str(dtype).removeprefix("torch."), str(error).splitlines()[0]
        say_once(logging.INFO, f"experts multiply one after another on this {device} in {name}: {reason}")
        return False
    return True


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    d_y, operators = d_y.contiguous(), torch.ops.headroom
    d_x = operators.grouped_product(d_y, weight.mT, ends) if ctx.needs_input_grad[0] else None
    d_weight = operators.grouped_outer(d_y, x, ends) if ctx.needs_input_grad[1] else None
    return d_x, d_weight, None


_LIBRARY = torch.library.Library("headroom", "DEF")
for _signature, _function, _shape in (
    ("grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor", _product, lambda x, w, _: (len(x), w.shape[1])),
    (
        "grouped_outer(Tensor d_y, Tensor x, Tensor ends) -> Tensor",
        _outer,
        lambda y, x, e: (len(e), y.shape[1], x.shape[1]),
    ),
):
    _name = _LIBRARY.define(_signature)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"headroom::{_name}", lambda *of, shape=_shape: of[0].new_empty(shape(*of)), lib=_LIBRARY
    )
torch.library.register_autograd("headroom::grouped_product", _backward, setup_context=_save, lib=_LIBRARY)
