"""One process at a time."""

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
    """Holds a lock file until the end of a `with` block, or of the process, in whatever way it ends. Where another
    process holds it: waits, saying what `busy` says, or raises UserError with it. Raises OSError where the file cannot
    be made, or a link or no regular file stands in its place: older releases of filelock empty what a link leads to."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise NotRegularFile("it is no regular file")
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
    log.info(busy)
    return FileLock(path).acquire()
