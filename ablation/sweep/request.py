"""What the command of a sweep asks for: every cell composed, so that nothing is left to be refused later."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from pydantic import Field

from ablation.match import Budget
from ablation.sweep.grid import Grid, check_known, grid_of, short_hash
from ablation.sweep.stored import SWEEPS, by_variant, read_sweep
from common.errors import UserError
from common.overrides import key_of
from common.settings import FrozenSettings
from training.run.composer import compose_tree
from training.run.config import Run, pop_command_settings
from training.run.experiments import experiment_named
from training.run.start import run_of
from training.run.validation_errors import validated

NOT_IN_SWEEPS = {
    "resume": "resume= continues one run: leave it out; a sweep goes on with the command that began it",
    "run_dir": "run_dir= is the folder of one run: name the sweep instead, as in sweep=heads",
}
BUDGETS = get_args(Budget)
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.=,+@-]{0,99}"  # of a sweep, which is its folder's


class SweepSettings(FrozenSettings):
    """Settings of the command, the same in all cells."""

    sweep: str | None
    match: list[Budget]
    minutes: float | None = Field(gt=0, le=1e6)
    max_minutes: float | None = Field(gt=0, le=1e9)
    hypothesis: str | None


class Request(NamedTuple):
    """What a command asks for, composed."""

    typed: list[str]
    grid: Grid
    settings: SweepSettings
    runs: dict[str, Run]  # by variant, with the seed of its first cell


def requested(typed: Sequence[str]) -> Request:
    """Compose every cell. Raises UserError for whatever one of them could not begin with."""
    grid = grid_of(typed, _varying_before(typed))
    check_known(grid.cells, grid.varying)
    with experiment_named(typed):
        settings, runs = composed(grid)
    if settings.minutes is not None and any(key_of(word) == "steps" for cell in grid.cells for word in cell.overrides):
        raise UserError("minutes= is in the place of steps=: leave one of them out")
    return Request(list(typed), grid, settings, runs)


def _varying_before(typed: Sequence[str]) -> list[str]:
    """What varies in the sweep of that name, if there is one: a command may add to it with one value of each."""
    name = next((word.removeprefix("sweep=") for word in typed if word.startswith("sweep=")), None)
    before = read_sweep(SWEEPS / name) if name and re.fullmatch(NAME, name) else None
    return [] if before is None else before.varying


def composed(grid: Grid) -> tuple[SweepSettings, dict[str, Run]]:
    """The settings of the sweep, and each variant's run. Raises UserError for whatever a cell could not begin with."""
    settings: dict[str, SweepSettings] = {}
    runs: dict[str, Run] = {}
    for variant, (first, *others) in by_variant(grid.cells).items():
        settings[variant], tree = _composed_tree([*grid.command, *first.overrides])
        runs[variant] = run_of(tree, first.overrides)
        for cell in others:  # composing takes a tenth of a second, and but for init_from nothing refers to the seed
            whole = cell.seed is None or first.seed is None or tree["init_from"] is not None
            other = _composed_tree([*grid.command, *cell.overrides])[1] if whole else tree | {"seed": cell.seed}
            run_of(other, cell.overrides)
    name, own = next(iter(settings.items()))
    other = next((variant for variant in settings if settings[variant] != own), None)
    if other is not None:
        raise UserError(
            f"{name} and {other} are of experiments that state other sweeps (match=, hypothesis=, ...): "
            "give one at a time"
        )
    return own, runs


def _composed_tree(overrides: Sequence[str]) -> tuple[SweepSettings, dict[str, Any]]:
    tree = compose_tree(*overrides)
    for name, complaint in NOT_IN_SWEEPS.items():
        if tree[name] is not None:
            raise UserError(complaint)
    given = pop_command_settings(tree)
    given.pop("resume")
    chosen = given["match"]
    given["match"] = [] if chosen == "none" else [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(given["match"], list) or not set(map(str, given["match"])) <= set(BUDGETS):
        raise UserError(f"match={chosen}: choose none, {', '.join(BUDGETS)}, or a list of these, as [cache,params]")
    _check_name(given["sweep"])
    return validated(SweepSettings, "", given), tree


def _check_name(name: Any) -> None:
    if name is not None and not re.fullmatch(NAME, str(name)):
        raise UserError(
            f"sweep={str(name)[:100]} cannot be a folder's name: give letters, digits and _.=,+@-, 100 at most, the "
            "first a letter, a digit or _"
        )


def default_name(request: Request) -> str:
    """A name that the same command gives again, whatever the order of its words: what varies, and a hash of all."""
    grid = request.grid
    varying = "-".join(one.key.rpartition(".")[2] for one in grid.varying)[:60]
    values = [[value.word for value in one.values] for one in grid.varying]  # the first of which make the baseline
    return f"{varying}-{short_hash((settings_of(grid), values, request.settings.match, request.settings.minutes))}"


def settings_of(grid: Grid) -> list[str]:
    """The settings that are the same in all runs, by which a sweep is known."""
    return sorted(word for word in grid.fixed if key_of(word) != "dry_run")
