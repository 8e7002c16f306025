"""File locks: one process at a time."""

import logging
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from common.atomic_io import NotRegularFile
from common.errors import UserError

log = logging.getLogger("headroom")


def lock(path: Path, busy: str, wait: bool = False) -> AbstractContextManager:
    """Lock a file until the end of a `with` block, or of the process, however it ends.

    Where another process has the lock: logs `busy` and waits, or, unless `wait`, raises UserError(busy). Raises OSError
    where the file cannot be made, or is a link or not a regular file: older releases of filelock empty a link's target.
    """
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise NotRegularFile("it is no regular file")
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
    log.info(busy)
    return FileLock(path).acquire()
