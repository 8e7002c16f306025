"""sweeps/NAME/sweep.json: what a sweep is to be, written before its first run. Whatever happens to a cell, the report
knows that it was asked for."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from common.atomic_io import exists, names_in, read_regular, write_atomic
from common.checksummed_json import parse_object
from common.errors import UserError, reason
from common.invocation import command
from common.paths import entering, is_folder, raise_unreadable
from common.settings import FrozenSettings
from training.run.migrate import migrate

SWEEPS = Path("sweeps")
SWEEP_FILE = "sweep.json"
OUTCOMES_FILE = "outcomes.json"  # how the process of a cell ended that did not finish, by the cell's name
MAX_BYTES = 2**26
FORMAT = 2
RUN_FORMAT_1 = 6  # the format of the settings that a sweep of format 1 holds
OfVariant = TypeVar("OfVariant")


class PlannedCell(FrozenSettings):
    """One run of a sweep, as it was asked for."""

    name: str  # also that of its folder
    variant: str  # the name without the seed
    seed: int | None  # None where no seed varies
    overrides: list[str]  # as Hydra takes them; what matching and measuring add for its variant is in Sweep.added


class Sweep(FrozenSettings):
    """The content of sweep.json."""

    format: int = Field(ge=1, le=FORMAT)
    commands: list[list[str]]  # the overrides of each command that added cells to it, as they were typed
    fixed: list[str]  # overrides of one value, as Hydra takes them
    varying: list[str]  # the settings that vary
    match: list[str]  # budgets
    minutes: float | None
    hypothesis: str | None
    reference: str  # the first variant, to whose budget the others are matched: the baseline
    added: dict[str, list[str]]  # by variant: overrides for matched budgets, and steps= where minutes= was given
    settings: dict[str, dict[str, Any]]  # by variant: all settings as they were composed, but for the seed
    cells: list[PlannedCell]

    def overrides_of(self, cell: PlannedCell) -> list[str]:
        return [*cell.overrides, *self.added[cell.variant]]


def by_variant(cells: Iterable[OfVariant]) -> dict[str, list[OfVariant]]:
    """What has a variant, by its name, in the order of first appearance."""
    found: dict[str, list[OfVariant]] = {}
    for cell in cells:
        found.setdefault(cell.variant, []).append(cell)
    return found


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep of a folder; None where it holds none. Raises UserError where it cannot be read."""
    path = folder / SWEEP_FILE
    try:
        with entering(folder):
            if not exists(path):
                return None
        return Sweep(**_migrated(parse_object(read_regular(path, MAX_BYTES).decode())))
    except OSError as error:
        fault = reason(error)
    except (ValueError, ValidationError) as error:
        fault = "it is not what a sweep writes" if isinstance(error, ValidationError) else str(error)
    raise UserError(f"{path} is damaged ({fault}): bring it back; its runs can be compared, as {folder}/*")


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """Convert what an older Headroom wrote: settings, and the document mask's name. What is not of the form that was
    written then is left for the caller to refuse."""
    old = content.get("settings")
    if (
        content.get("format") != 1
        or not isinstance(old, dict)
        or not all(isinstance(tree, dict) for tree in old.values())
    ):
        return content
    settings = {variant: migrate(tree, RUN_FORMAT_1) for variant, tree in old.items()}
    return _with_mask_renamed(content) | {"format": FORMAT, "settings": settings}


def _with_mask_renamed(content: Any) -> Any:
    if isinstance(content, str):
        return content.replace("data.document_mask=", "document_mask=")
    if isinstance(content, list):
        return [_with_mask_renamed(each) for each in content]
    return {key: _with_mask_renamed(each) for key, each in content.items()} if isinstance(content, dict) else content


def hint_for(folder: Path) -> str:
    """What somebody may have meant who named a folder that is neither a run nor a sweep; empty where it holds none."""
    try:
        inside = [folder / name for name in names_in(folder)]
    except OSError:
        return ""
    if any(os.path.isfile(each / SWEEP_FILE) for each in inside):
        return "; it holds sweeps: name one of them"
    if any(os.path.isfile(each / "config.yaml") for each in inside):
        return f"; it holds runs: name them, as in {folder}/*"
    return ""


def write_sweep(folder: Path, sweep: Sweep) -> None:
    _write(folder / SWEEP_FILE, sweep.model_dump())


def read_outcomes(folder: Path) -> dict[str, str]:
    """How cells ended that did not finish, by their names; {} where nothing can be read: the runs themselves count."""
    try:
        found = parse_object(read_regular(folder / OUTCOMES_FILE, MAX_BYTES).decode())
    except (OSError, ValueError):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def record_outcome(folder: Path, cell: str, outcome: str | None) -> None:
    """outcome: in words; None for a cell that finished."""
    outcomes = {name: text for name, text in read_outcomes(folder).items() if name != cell}
    _write(folder / OUTCOMES_FILE, outcomes | ({} if outcome is None else {cell: outcome}))


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from None


def newest_sweep() -> Path | None:
    """The sweep under sweeps/ in which something happened last; None where there is none. Raises UserError where they
    cannot be listed."""
    try:
        folders = [SWEEPS / name for name in names_in(SWEEPS)]
    except OSError as error:
        raise_unreadable(SWEEPS.resolve(), error)
    begun = {}
    for folder in folders:
        if is_folder(str(folder)) and os.path.isfile(folder / SWEEP_FILE):
            begun[folder] = max(os.stat(folder / name).st_mtime for name in _recent(folder))
    return max(begun, key=begun.get) if begun else None


def _recent(folder: Path) -> list[str]:
    return [name for name in (SWEEP_FILE, OUTCOMES_FILE) if os.path.isfile(folder / name)]


def sweep_command(typed: list[str]) -> str:
    """The shell command of a sweep, which begins it or goes on with it."""
    return command("train.py", "-m", *typed)
