"""Save figures as picture files. Imports nothing heavy, so that a path is checked before anything is computed."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

from common.atomic_io import write_atomic
from common.errors import UserError, reason

FORMATS = ("pdf", "png", "svg")


def check_writable(path: Path, flag: str) -> None:
    """Raises UserError where `path`, given with `flag`, cannot become a picture."""
    if path.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"{flag} {path}: choose a name that ends in one of {', '.join(f'.{name}' for name in FORMATS)}")
    folder = path.parent
    fault = None
    if not folder.is_dir():
        fault = f"there is no folder {folder}"
    elif path.is_dir():
        fault = "it is a folder"
    elif not os.access(folder, os.W_OK):
        fault = f"nothing may be written to {folder}"
    if fault:
        raise UserError(f"{flag} {path} cannot be written: {fault}")


def save(figure: Any, path: Path) -> None:
    """Save a matplotlib figure atomically, in the format of the file's suffix. Raises UserError."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn instead
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # the legend has more runs than fit
        figure.savefig(picture, dpi=120, format=path.suffix.removeprefix("."))
    try:
        write_atomic(path, picture.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from None
