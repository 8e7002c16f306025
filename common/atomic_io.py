"""Files and folders that stand whole or not at all, whatever ends the process or the power; and reading that neither
hangs nor takes what it could not read for what is not there.
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

UNFINISHED = ".writing-"  # how the names of temporary files and folders begin
REPLACED = ".replaced-"  # and that of a folder whose name another one is about to take
# Of errors: nothing is there, or a link that leads nowhere or to itself. All others leave open whether something is.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NOWHERE = "it is a link that leads nowhere: is a disk not mounted?"


class NotRegularFile(OSError):
    """Where a file should be stands a folder, a pipe, a device or a socket, a link that leads nowhere, or one that is
    larger than it may be."""

    def __init__(self, reason: str):
        super().__init__(errno.EINVAL, reason)


def exists(path: Path) -> bool:
    """Whether something is there, behind a link too. Raises OSError where that cannot be told (Path.exists answers
    False to that in some releases of Python), as of a link that leads nowhere: its disk may be away."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        _refuse_dangling(path)
        return False
    return True


def _refuse_dangling(path: Path) -> None:
    if os.path.islink(path):
        raise NotRegularFile(NOWHERE)


def names_in(folder: Path) -> list[str]:
    """Sorted; [] where there is no such folder. Raises OSError where it cannot be read, to which Path.glob finds
    nothing, and where it is a link that leads nowhere."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        _refuse_dangling(folder)
        return []


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """For reading, `buffering` bytes at one time. Raises OSError, and NotRegularFile for any other file, which
    could block for ever."""
    _refuse_irregular(os.stat(path))  # not opened even: that alone can rewind a tape, or wait for a writer
    file = open(path, "rb", buffering, opener=_without_waiting)  # noqa: SIM115
    try:
        _refuse_irregular(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, and NotRegularFile for any other."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            content = file.read(limit + 1)  # some files of the system say that they are empty
            if len(content) <= limit:
                return content
    raise NotRegularFile(f"it is larger than {limit:,} bytes, the most that is read of it")


def _refuse_irregular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularFile(f"it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}")


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces the file as a whole. Raises OSError, and leaves what stood there; also for a link that leads nowhere,
    behind which the file may be."""
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
    """With its parents, on the disk when it returns."""
    path.mkdir(parents=True, exist_ok=exist_ok)
    _sync(path.parent)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the place of `final` when the block ends without an error.

    What stood there is removed only when its successor is on the disk. No call exchanges two folders at once, so a kill
    can leave none under that name: `remove_unfinished` brings the old one back then.
    """
    temporary = _temporary(final)
    before = final.with_name(f"{REPLACED}{secrets.token_hex(4)}-{final.name}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if exists(final):
            os.rename(final, before)
        os.rename(temporary, final)
        _sync(final.parent)
    finally:
        _settle(before, final)
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(before: Path, final: Path) -> None:
    """Of a replacement that has ended in whatever way: removes what stood at `final`, or brings it back where nothing
    has taken its place."""
    if os.path.lexists(final):
        remove(before)
    elif os.path.lexists(before):
        os.rename(before, final)


def remove_atomic(folder: Path) -> None:
    """Removes a folder so that no part of it is ever seen under its name."""
    unfinished = _temporary(folder)
    os.rename(folder, unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes what killed processes left unfinished of `name`, and brings back what they were about to replace; what
    cannot be removed is left. Call it only where no other process can be writing."""
    with suppress(OSError):
        for found in names_in(folder):
            replaced = found.removeprefix(REPLACED).partition("-")[2] if found.startswith(REPLACED) else ""
            if replaced and replaced.startswith(name):
                _settle(folder / found, folder / replaced)
            elif found.startswith(f"{UNFINISHED}{name}"):
                remove(folder / found)


def remove(path: Path) -> None:
    """A file, a link, or a folder with all in it; what cannot be removed is left."""
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
