"""Write a report's files: report.json, report.md, report.html and pictures, each whole or not at all."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation.pages import html, pictures
from ablation.pages.markdown import markdown
from ablation.results import Report
from common.atomic_io import make_folder, write_atomic
from common.errors import UserError, reason
from common.figures import save

NUMBERS = re.compile(
    r'\[\n\s+([^\[\]{}"]*?)\n\s+\]'
)  # a list of numbers in indented JSON; no text has a line end there


def write(report: Report, folder: Path, x: str = "tokens", y: str = "bpb", log: bool = False) -> list[Path]:
    """Write the report into `folder`, which is made where there is none -> the files, report.html first.

    x: steps, tokens, seconds or flops; y: bpb or loss; log: both axes. All three are of the curves. Raises UserError.
    """
    drawn = pictures.figures(report, x, y, log)
    captions = {name: pictures.CAPTIONS[name] for name in drawn}
    texts = {
        "report.html": html.page(report, x, y, log),
        "report.md": markdown(report, captions),
        "report.json": as_json(report),
    }
    _make(folder)
    for name, content in texts.items():
        _write(folder / name, content)
    for name, figure in drawn.items():
        save(figure, folder / name)
    return [folder / name for name in [*texts, *drawn]]


def as_json(report: Report) -> str:
    """The report with all digits, in the order of its declaration. Numbers that are not finite are null."""
    indented = json.dumps(_finite(asdict(report)), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    return NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", indented) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _make(folder: Path) -> None:
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"no report can be written to {folder}: {reason(error)}; choose another folder by -o") from None


def _write(path: Path, content: str) -> None:
    try:
        write_atomic(path, content.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's own escape
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; choose another folder by -o") from None
