"""torch.compile, with a fallback to eager execution and a warning where it does not work."""

import logging
from collections.abc import Callable
from typing import Any

import torch


def compiled_or_eager(function: Callable, option: str, trial: Callable[..., None], **options: Any) -> Callable:
    """Compile a function: torch.compile(function, **options). What cannot be compiled runs eagerly, after a warning at
    the first call that names the option which asked for it.

    trial(function, *inputs) runs all that there is to compile once more than was asked for, before the first call.
    """
    chosen = None

    def call(*inputs: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            try:
                chosen = torch.compile(function, **options)
                trial(chosen, *inputs)
            except Exception as error:
                reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
                logging.getLogger("headroom").warning(f"{option} failed, running eagerly: {reason}")
                chosen = function
        return chosen(*inputs)

    return call
