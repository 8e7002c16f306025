"""Atomic writes: files and folders that exist whole or not at all, even when the process is killed or the power fails.
And reading that never blocks, and never takes an unreadable file for a missing one.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".writing-"  # prefix of temporary files and folders
REPLACED = ".replaced-"  # prefix of a folder that is being replaced
# Errors of a path that does not exist, or is a link to nothing or to itself. After any other error, it may exist.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NOWHERE = "it is a link that leads nowhere: is a disk not mounted?"


class NotRegularFile(OSError):
    """The path is a folder, a pipe, a device, a socket or a link that leads nowhere, or the file is too large."""

    def __init__(self, reason: str):
        super().__init__(errno.EINVAL, reason)


def exists(path: Path) -> bool:
    """Whether the path exists; links are followed. Raises OSError where that is unknown, for which Path.exists returns
    False in some releases of Python, and for a link that leads nowhere: its disk may not be mounted."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        _check_link(path)
        return False
    return True


def _check_link(path: Path) -> None:
    if os.path.islink(path):
        raise NotRegularFile(NOWHERE)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted; [] where there is no such folder. Raises OSError where it cannot be read, for which
    Path.glob finds nothing, and where it is a link that leads nowhere."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        _check_link(folder)
        return []


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading `buffering` bytes at one time. Raises OSError, and NotRegularFile for anything
    else, which could block forever."""
    _check_regular(os.stat(path))  # before opening, which can rewind a tape or wait for a writer
    file = open(path, "rb", buffering, opener=_open_nonblocking)  # noqa: SIM115
    try:
        _check_regular(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _open_nonblocking(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def read_at(file: int, place: int, count: int) -> bytes:
    """Read `count` bytes of an open file from a place in it; fewer only where it ends. file: its descriptor."""
    content = b""
    while len(content) < count and (more := os.pread(file, count - len(content), place + len(content))):
        content += more
    return content


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, and NotRegularFile for any other."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            content = file.read(limit + 1)  # system files report a size of 0
            if len(content) <= limit:
                return content
    raise NotRegularFile(f"it is larger than {limit:,} bytes, the most that is read of it")


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularFile(f"it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}")


def write_atomic(path: Path, content: bytes) -> None:
    """Write or replace a file atomically. Raises OSError, and leaves the old file as it was; also for a link that leads
    nowhere, behind which the file may be."""
    exists(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path, exist_ok: bool = True) -> None:
    """Make a folder with its parents, all synced to disk."""
    new = [one for one in (path, *path.parents) if not os.path.lexists(one)]
    path.mkdir(parents=True, exist_ok=exist_ok)
    for one in new:
        _sync(one.parent)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final`, or replaces it, when the block ends without an error.

    The old folder is removed only when the new one is on the disk. No call exchanges two folders at once, so a kill can
    leave none under that name: `remove_unfinished` restores the old one then.
    """
    temporary = _temporary(final)
    old = final.with_name(f"{REPLACED}{secrets.token_hex(4)}-{final.name}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if exists(final):
            os.rename(final, old)
        os.rename(temporary, final)
        _sync(final.parent)
    finally:
        _finish_replacement(old, final)
        shutil.rmtree(temporary, ignore_errors=True)


def _finish_replacement(old: Path, final: Path) -> None:
    """After a replacement, however it ended: remove the old folder, or restore it where no new one exists."""
    if os.path.lexists(final):
        remove(old)
    elif os.path.lexists(old):
        os.rename(old, final)


def remove_atomic(folder: Path) -> None:
    """Remove a folder: under its name it exists whole or not at all."""
    unfinished = _temporary(folder)
    os.rename(folder, unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove temporary files that killed processes left for names that begin with `name`, and restore the folders they
    were replacing. Leaves what cannot be removed. Call it only where no other process can be writing."""
    with suppress(OSError):
        for found in names_in(folder):
            replaced = found.removeprefix(REPLACED).partition("-")[2] if found.startswith(REPLACED) else ""
            if replaced and replaced.startswith(name):
                _finish_replacement(folder / found, folder / replaced)
            elif found.startswith(f"{UNFINISHED}{name}"):
                remove(folder / found)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; leaves what cannot be removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _temporary(final: Path) -> Path:
    return final.with_name(f"{UNFINISHED}{final.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
