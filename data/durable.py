"""Files and folders that stand whole or not at all, whatever ends the process or the power, and that prove it."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.errors import UserError

UNFINISHED = ".writing-"  # how the names of temporary files and folders begin
log = logging.getLogger("headroom")


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file as a whole. Raises OSError, and leaves what stood there."""
    handle, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the place of `final` when the block ends without an error."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{final.name}-", dir=final.parent))
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.chmod(0o755)
        if final.exists():
            discard(final)
        os.rename(temporary, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes a folder so that no part of it is ever seen under its name."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}-discarded")
    os.rename(folder, unfinished)
    shutil.rmtree(unfinished)


def sweep(folder: Path, name: str = "") -> None:
    """Removes what killed processes left unfinished of `name`. Call it only where no other process can be writing."""
    for path in folder.glob(f"{UNFINISHED}{name}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def lock(path: Path, busy: str, wait: bool = False) -> AbstractContextManager:
    """Holds a lock file until the end of a `with` block, or of the process, in whatever way it ends. Where another
    process holds it: waits, saying what `busy` says, or raises UserError with it."""
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
    log.info(busy)
    return FileLock(path).acquire()


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: dict[str, Any]) -> str:
    """JSON that carries its own hash."""
    return json.dumps(content | {"hash": digest(content)}, indent=0)


def unsealed(text: str) -> dict[str, Any]:
    """The content of what `sealed` gave. Raises ValueError where a character of it has changed."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or "hash" not in content:
        raise ValueError("it holds no hash")
    if content.pop("hash") != digest(content):
        raise ValueError("its hash does not match its content")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
