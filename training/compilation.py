"""torch.compile where it works; eager, and a word about it, where it does not."""

import logging
from collections.abc import Callable

import torch


def maybe_compiled(function: Callable, enabled: bool) -> Callable:
    """The function, compiled on its first call if enabled. A failure to compile is announced once, and the call and all
    later ones run eagerly; an error of the function's own then shows as it is."""
    if not enabled:
        return function
    chosen = torch.compile(function, dynamic=False)

    def call(*args):
        nonlocal chosen
        if chosen is function:
            return function(*args)
        try:
            return chosen(*args)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logging.getLogger("headroom").warning(f"compile=true failed, running eagerly: {reason}")
            chosen = function
            return function(*args)

    return call
