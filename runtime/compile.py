"""torch.compile, with a fallback to eager execution and a warning where it does not work."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError


class CompiledOrEager:
    """A function compiled by torch.compile, anew for tensors of other shapes. What cannot be compiled runs eagerly,
    after a warning that names the option which asked for it; that holds for the shapes it met, so that a run resumed
    later computes as this one."""

    def __init__(self, function: Callable, option: str, trial: Callable[..., None], **options: Any):
        """trial(function, *inputs) runs all that there is to compile once more than was asked for, before the first
        call with inputs of such shapes. options: of torch.compile."""
        self.function = function
        self.option = option
        self.trial = trial
        self.options = options
        self.chosen: dict[tuple, Callable] = {}  # by the shapes of the inputs
        self.warnings: set[str] = set()

    @functools.cached_property
    def compiled(self) -> Callable:
        return torch.compile(self.function, **self.options)

    def __call__(self, *inputs: Any) -> Any:
        shapes = _shapes(inputs)
        if shapes not in self.chosen:
            self.chosen[shapes] = self._tried(inputs)
        if self.chosen[shapes] is not self.function:
            try:
                return self.chosen[shapes](*inputs)
            except Exception as error:  # of what else makes it compile anew, as the shape of a KV cache
                if not _is_compilers(error):
                    raise
                self._warn(error)
            self.chosen[shapes] = self.function
        return self.function(*inputs)

    def _tried(self, inputs: tuple) -> Callable:
        try:
            self.trial(self.compiled, *inputs)
        except (UserError, torch.OutOfMemoryError):  # which say nothing about the compiler
            raise
        except Exception as error:
            self._warn(error)
            return self.function
        return self.compiled

    def _warn(self, error: Exception) -> None:
        reason = reason_of(error)
        if reason not in self.warnings:
            self.warnings.add(reason)
            logging.getLogger("headroom").warning(f"{self.option} failed, running eagerly: {reason}")


def reason_of(error: Exception) -> str:
    """The first lines of a compiler's message, as one."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])


def _shapes(inputs: tuple) -> tuple:
    """The shapes of the tensors among the inputs, and of those in tuples among them."""
    return tuple(
        one.shape if isinstance(one, Tensor) else _shapes(one) if isinstance(one, tuple) else None for one in inputs
    )


def _is_compilers(error: Exception) -> bool:
    """Whether an error is torch.compile's own, and none of the function that was compiled."""
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, as a call of what it compiled did

    return isinstance(error, TorchDynamoException)
