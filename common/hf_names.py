"""Names of published models where a run can be named, too: hf:DIR."""

from pathlib import Path

PREFIX = "hf:"


def is_published(name: Path | str) -> bool:
    return str(name).startswith(PREFIX)


def folder_of(name: Path | str) -> Path:
    """The folder of a run, or of a published model."""
    return Path(str(name).removeprefix(PREFIX))
