"""List the files that a glob pattern matches or a folder contains: sorted, each once, whatever links there are."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from common.atomic_io import NOT_THERE
from common.errors import UserError, reason

FileId = tuple[int, int]  # device and inode


def matching_files(pattern: str) -> list[str]:
    """The regular files that a glob pattern matches, sorted; of several names of one file, the first.

    As in a shell: * ? [ ] match within a name, ** matches any number of folders, neither matches names that begin with
    a dot, and ~ is the home folder. A name with * ? [ ] that exists as it is written is taken literally. ** does not
    enter links to folders, which could form a cycle. Raises UserError for a folder that cannot be read.
    """
    pattern = os.path.expanduser(pattern)
    names = [name for name in pattern.split("/") if name]
    found = {"/" if pattern.startswith("/") else ""}
    for name in [*names, "*"] if names[-1:] == ["**"] else names:
        found = {path for folder in found for path in _expanded(folder, name)}
    once: dict[FileId, str] = {}
    for path in sorted(found):
        file_id = _regular(path)
        if file_id is not None:
            once.setdefault(file_id, path)
    return list(once.values())


def files_below(folder: Path) -> list[Path]:
    """The regular files in a folder and its subfolders, sorted; links to folders are not entered. Raises UserError for
    a folder that cannot be read."""

    def failed(error: OSError) -> None:
        if error.errno not in NOT_THERE:
            raise_unreadable(error.filename, error)

    found = (os.path.join(place, name) for place, _, names in os.walk(folder, onerror=failed) for name in names)
    return sorted(Path(path) for path in found if _regular(path) is not None)


def is_folder(path: str) -> bool:
    """Whether the path is a folder. Raises UserError where that is unknown."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def file_ids(paths: Iterable[str]) -> dict[FileId, str]:
    """Map each file's identity on the disk to its path, so that two names of one file compare equal. Missing files are
    left out."""
    found = ((_regular(path), path) for path in paths)
    return {file_id: path for file_id, path in found if file_id is not None}


def working_folder() -> str:
    """The working directory, for messages."""
    try:
        return os.getcwd()
    except OSError:
        return "a working directory that does not exist any more"


def raise_unreadable(path: str | Path, error: OSError, advice: str | None = None) -> NoReturn:
    """Raise an OSError as a UserError that names the file or folder, and the way out."""
    raise UserError(f"{path} cannot be read: {reason(error)}" + (f": {advice}" if advice else "")) from None


@contextmanager
def entering(folder: str | Path) -> Iterator[None]:
    """A context for reading a folder: raises UserError where this user may not."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be entered: {reason(error)}: let this user read it") from None


def _expanded(folder: str, name: str) -> Iterator[str]:
    """The paths that one component of a pattern matches in a folder ("": the working directory)."""
    path = os.path.join(folder, name)
    if name == "**":
        yield from _folders(folder)
    elif not set(name) & set("*?[") or os.path.lexists(path):
        yield path
    else:
        for entry in _entries(folder):
            if fnmatchcase(entry.name, name) and (name.startswith(".") or not entry.name.startswith(".")):
                yield os.path.join(folder, entry.name)


def _folders(folder: str) -> Iterator[str]:
    """A folder and all its subfolders."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        yield folder
        inner = (entry for entry in _entries(folder) if not entry.name.startswith("."))
        waiting += (os.path.join(folder, entry.name) for entry in inner if entry.is_dir(follow_symlinks=False))


def _entries(folder: str) -> list[os.DirEntry]:
    """The entries of a folder; [] where it is not a folder."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return list(entries)
    except ValueError:  # not a valid path: it contains a NUL character
        return []
    except OSError as error:
        if error.errno in NOT_THERE:
            return []
        raise_unreadable(folder or os.curdir, error, "allow it, or give a path that leads elsewhere")


def _regular(path: str) -> FileId | None:
    """The identity of a regular file; None where there is none, or only a pipe or a device."""
    status = _status(path)
    return (status.st_dev, status.st_ino) if status is not None and stat.S_ISREG(status.st_mode) else None


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except ValueError:  # not a valid path: it contains a NUL character
        return None
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise_unreadable(path, error)
