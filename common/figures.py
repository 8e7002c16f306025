"""Figures, their labels and legends, and saving them as picture files. Imports nothing heavy, so that a path is checked
before anything is computed.
"""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.atomic_io import write_atomic
from common.errors import UserError, escaped, reason

FORMATS = ("pdf", "png", "svg")


def check_writable(path: Path, flag: str, formats: Sequence[str] = FORMATS) -> None:
    """Raises UserError where `path`, given with `flag`, cannot become a file of one of the formats."""
    if path.suffix.removeprefix(".") not in formats:
        names = ", ".join(f".{name}" for name in formats)
        raise UserError(f"{flag} {path}: choose a name that ends in {'one of ' if len(formats) > 1 else ''}{names}")
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


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """An empty figure, in inches, and its axes: a list of them where there are several panels beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: nothing global, and no window
    axes = figure.subplots(1, panels)
    for each in axes if panels > 1 else (axes,):
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(text: Any, name: str) -> None:
    """Give one of matplotlib's texts a name: no formula, whatever is in it."""
    text.set(text=escaped(name), parse_math=False)


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """Ticks at 0, 1, ... with these names."""
    axis.set_ticks(range(len(names)), [escaped(name) for name in names])
    for text in axis.get_ticklabels():
        text.set_parse_math(False)


def legend(owner: Any, lines: Mapping[str, Any]) -> None:
    """A legend of lines by name: of a figure, beside its axes; of axes, where they have room. None without lines."""
    from matplotlib.figure import Figure

    if not lines:
        return
    place = {"loc": "outside right upper"} if isinstance(owner, Figure) else {}
    unnamed = ["-"] * len(lines)  # matplotlib itself would drop names that begin with _
    made = owner.legend([*lines.values()], unnamed, fontsize="small", frameon=not place, **place)
    for text, name in zip(made.get_texts(), lines, strict=True):
        label(text, name)


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
