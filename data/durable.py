"""Files and folders that stand whole or not at all, whatever ends the process or the power."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".writing-"  # how the names of temporary files and folders begin


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file as a whole. Raises OSError, and leaves what stood there."""
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
def whole_folder(final: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the place of `final` when the block ends without an error."""
    temporary = _temporary(final)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if final.exists():
            discard(final)
        os.rename(temporary, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes a folder so that no part of it is ever seen under its name."""
    unfinished = _temporary(folder)
    os.rename(folder, unfinished)
    shutil.rmtree(unfinished)


def sweep(folder: Path, name: str = "") -> None:
    """Removes what killed processes left unfinished of `name`. Call it only where no other process can be writing."""
    for path in folder.glob(f"{UNFINISHED}{name}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary(final: Path) -> Path:
    return final.with_name(f"{UNFINISHED}{final.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
