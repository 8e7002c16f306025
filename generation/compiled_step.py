"""The decode step, compiled, and whether that was worth its time."""

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from runtime.compile import CompiledOrEager

TIMED_STEPS = 3


class CompiledStep:
    """A decode step that torch.compile traces once for inputs of the same shapes: `tokens` are to be written, for which
    the KV caches get room before. It warns, at the first call, where eager execution would have written them sooner."""

    def __init__(self, eager: Callable[..., Tensor], tokens: int):
        self.tokens = tokens
        self.eager = eager
        self.timed = False
        self.step = CompiledOrEager(eager, "--compile", self._try, dynamic=False)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.step(*inputs)

    def _try(self, compiled: Callable[..., Tensor], *inputs: Any) -> None:
        """Time the steps: the inputs again and again, which caches the same again."""
        compiling = _seconds(compiled, inputs)
        if self.timed:
            return
        self.timed = True
        eager, fast = (min(_seconds(step, inputs) for _ in range(TIMED_STEPS)) for step in (self.eager, compiled))
        saved = self.tokens * (eager - fast)
        if saved < compiling:
            times = f"took {compiling:.0f} s and saves {max(saved, 0):.1f} s in {self.tokens:,} tokens"
            logging.getLogger("headroom").warning(f"--compile {times}: leave it out, or write more")


def _seconds(step: Callable[..., Tensor], inputs: tuple[Any, ...]) -> float:
    begun = time.perf_counter()
    step(*inputs).cpu()  # waits for the device
    return time.perf_counter() - begun
