"""torch.compile for the losses of training, with a fallback to eager execution."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.kernels.base import say_once
from runtime.compile import CompiledOrEager

AUTOTUNED = "max-autotune-no-cudagraphs"  # as torch.compile calls it


def maybe_compiled(function: Callable, enabled: bool, autotune: bool = False) -> Callable:
    """Compile a function(model, ...) -> tensor, or tuple with the loss first, if enabled.

    autotune: of several kernels for a matrix product, the one that is fastest when tried; without CUDA graphs, which
    PyTorch's max-autotune records besides. What cannot be compiled runs eagerly, after a warning at the first call of
    such shapes: the backward pass too is compiled by then, since its compiler would otherwise fail amid a step.
    """
    if not enabled:
        return function
    if autotune:
        say_once(logging.INFO, "autotune takes what was fastest when tried: a resumed run may differ in its bits")
    mode = AUTOTUNED if autotune else None
    return CompiledOrEager(function, "compile=true", _try_once, dynamic=False, mode=mode)


def _try_once(function: Callable, model: nn.Module, *inputs: Any) -> None:
    """Run forward and backward once, which compiles both, and leave gradients and random generators as they were."""
    with torch.random.fork_rng():  # dropout masks would be drawn
        first = function(model, *inputs)
        loss = first[0] if isinstance(first, tuple) else first
        if loss.requires_grad:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
