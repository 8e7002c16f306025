"""Experimental choices: written for hardware that they have never run on. docs/status.md lists them."""

import functools
import logging


@functools.cache
def warn_experimental(choice: str) -> None:
    """Warn, once in a process. choice: as a user sets it, as in `precision=fp8`."""
    logging.getLogger("headroom").warning(f"{choice} is experimental: never run on its hardware, see docs/status.md")
