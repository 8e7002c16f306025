"""torch.compile where it works; eager, and a word about it, where it does not."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.kernels.base import say_once

AUTOTUNED = "max-autotune-no-cudagraphs"  # as torch.compile calls it


def maybe_compiled(function: Callable, enabled: bool, autotune: bool = False) -> Callable:
    """function(model, ...), compiled if enabled. autotune: of several kernels for a product, the one that is fastest
    when tried; without CUDA graphs, which PyTorch's max-autotune records besides. What cannot be compiled runs eagerly,
    as is announced at the first call: the backward pass too is compiled by then, since its compiler would otherwise
    speak up in the midst of it."""
    if not enabled:
        return function
    if autotune:
        say_once(logging.INFO, "autotune takes what was fastest when tried: a resumed run may differ in its bits")
    chosen = None

    def call(model: nn.Module, *inputs: Tensor) -> Tensor:
        nonlocal chosen
        if chosen is None:
            try:
                chosen = torch.compile(function, dynamic=False, mode=AUTOTUNED if autotune else None)
                with torch.random.fork_rng():  # this call, too, would draw dropout masks
                    first = chosen(model, *inputs)
                    loss = first[0] if isinstance(first, tuple) else first
                    if loss.requires_grad:
                        torch.autograd.grad(loss, list(model.parameters()))
            except Exception as error:
                reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
                logging.getLogger("headroom").warning(f"compile=true failed, running eagerly: {reason}")
                chosen = function
        return chosen(model, *inputs)

    return call
