"""torch.compile, with a fallback to eager execution and a warning where it does not work."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled_or_eager(function: Callable, option: str, trial: Callable[..., None], **options: Any) -> Callable:
    """Compile a function: torch.compile(function, **options), which compiles anew for tensors of other shapes. What
    cannot be compiled runs eagerly, after a warning that names the option which asked for it; that holds for the shapes
    it met, so that a run resumed later computes as this one.

    trial(function, *inputs) runs all that there is to compile once more than was asked for, before the first call with
    inputs of such shapes.
    """
    compiled = functools.cache(lambda: torch.compile(function, **options))
    chosen: dict[tuple, Callable] = {}  # by the shapes of the inputs
    warnings = set()

    def take_eager(shapes: tuple, error: Exception) -> None:
        chosen[shapes] = function
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        if reason not in warnings:
            warnings.add(reason)
            logging.getLogger("headroom").warning(f"{option} failed, running eagerly: {reason}")

    def call(*inputs: Any) -> Any:
        shapes = _shapes(inputs)
        if shapes not in chosen:
            try:
                trial(compiled(), *inputs)
                chosen[shapes] = compiled()
            except Exception as error:
                take_eager(shapes, error)
        try:
            return chosen[shapes](*inputs)
        except Exception as error:  # of what makes it compile anew besides shapes of inputs, as that of a KV cache
            if chosen[shapes] is function or not _is_compilers(error):
                raise
            take_eager(shapes, error)
        return function(*inputs)

    return call


def _shapes(inputs: tuple) -> tuple:
    """The shapes of the tensors among the inputs, and of those in tuples among them."""
    return tuple(
        one.shape if isinstance(one, Tensor) else _shapes(one) if isinstance(one, tuple) else None for one in inputs
    )


def _is_compilers(error: Exception) -> bool:
    """Whether an error is torch.compile's own, and none of the function that was compiled."""
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, as a call of what it compiled did

    return isinstance(error, TorchDynamoException)
