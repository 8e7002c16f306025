"""Names of published models where a run can be named, too: hf:DIR."""

from pathlib import Path

from common.errors import UserError

PREFIX = "hf:"


def is_published(name: Path | str) -> bool:
    return str(name).startswith(PREFIX)


def folder_of(name: Path | str) -> Path:
    """The folder of a run, or of a published model. Raises UserError where nothing follows hf:."""
    if str(name) == PREFIX:
        raise UserError(f"{PREFIX} names no folder: give that of a published model behind it, {PREFIX}DIR")
    return Path(str(name).removeprefix(PREFIX))
