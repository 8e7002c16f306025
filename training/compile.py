"""torch.compile, with a fallback to eager execution and a warning where it does not work."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.kernels.base import say_once

AUTOTUNED = "max-autotune-no-cudagraphs"  # as torch.compile calls it


def maybe_compiled(function: Callable, enabled: bool, autotune: bool = False) -> Callable:
    """Compile a function(model, ...) -> tensor, or tuple with the loss first, if enabled.

    autotune: of several kernels for a matrix product, the one that is fastest when tried; without CUDA graphs, which
    PyTorch's max-autotune records besides. What cannot be compiled runs eagerly, after a warning at the first call: the
    backward pass too is compiled by then, since its compiler would otherwise fail in the midst of a step.
    """
    if not enabled:
        return function
    if autotune:
        say_once(logging.INFO, "autotune takes what was fastest when tried: a resumed run may differ in its bits")
    chosen = None

    def call(model: nn.Module, *inputs: Any) -> Tensor:
        nonlocal chosen
        if chosen is None:
            try:
                chosen = torch.compile(function, dynamic=False, mode=AUTOTUNED if autotune else None)
                _try_once(chosen, model, *inputs)
            except Exception as error:
                reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
                logging.getLogger("headroom").warning(f"compile=true failed, running eagerly: {reason}")
                chosen = function
        return chosen(model, *inputs)

    return call


def _try_once(function: Callable, model: nn.Module, *inputs: Any) -> None:
    """Run forward and backward once, which compiles both, and leave gradients and random generators as they were."""
    with torch.random.fork_rng():  # dropout masks would be drawn
        first = function(model, *inputs)
        loss = first[0] if isinstance(first, tuple) else first
        if loss.requires_grad:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
