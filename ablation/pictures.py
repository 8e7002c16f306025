"""Pictures of a report, by matplotlib."""

from pathlib import Path
from typing import Any

from ablation.results import Report

CAPTIONS: dict[str, str] = {}


def figures(report: Report, x: str, y: str, log: bool) -> dict[str, Any]:
    return {}


def save(figure: Any, path: Path) -> None:
    pass
