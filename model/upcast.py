"""Upcasts: what norms, rotations, softmax, routers and the loss compute in."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32; a float64 one as it is, so that a whole model can be computed in float64, which tests compare."""
    return x.to(upcast_dtype(x))


def upcast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `upcast(x)`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
