"""Which of several processes that run one program together speaks: the first. Another one speaks only of what went
wrong with it alone. torchrun says by environment variables which process this is. Imports nothing heavy."""

import os
import time
from collections.abc import Callable

GRACE = 3.0  # seconds after a fault, in which the first process says so itself if it has it too, and all are ended
_stderr: int | None = None  # where this process would write, if it spoke
reports_first: Callable[[], bool] | None = None  # whether no other process has reported a fault yet


def rank() -> int:
    """The number of this process among those that run the program together; 0 for one by itself."""
    return int(os.environ["RANK"]) if started_together() else 0


def size() -> int:
    return int(os.environ["WORLD_SIZE"]) if started_together() else 1


def local_rank() -> int:
    """Its number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def started_together() -> bool:
    return os.environ.get("RANK", "").isdecimal() and os.environ.get("WORLD_SIZE", "").isdecimal()


def hush() -> None:
    """Discard what this process writes to its standard streams, unless it is the first."""
    global _stderr
    if rank() == 0:
        return
    _stderr = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def speak_of_fault() -> str:
    """Call before a fault is reported on stderr -> what the report begins with. Where another process does so, this one
    stays silent."""
    global _stderr
    if _stderr is not None:
        time.sleep(GRACE)
    if reports_first is not None and not reports_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    elif _stderr is not None:
        os.dup2(_stderr, 2)
        _stderr = None
    return f"rank {rank()}: " if rank() else ""
