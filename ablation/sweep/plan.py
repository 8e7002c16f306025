"""The plan of a sweep: budgets matched, a step of each variant timed, and all of it printed, before any training."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ablation.match import match
from ablation.outcome import is_complete
from ablation.sweep.grid import Cell
from ablation.sweep.pace import Pace, pace_of, prepared
from ablation.sweep.request import FREE, Request, by_variant
from ablation.sweep.stored import FORMAT, PlannedCell, Sweep, read_sweep
from common.console import counted, level_of_log
from common.errors import UserError
from common.streams import print_stderr
from data.shards.prepare import Prepared
from training.minutes import steps_within
from training.run.checkpoint import steps_done
from training.run.config import Run, compose, dump, flatten_config


class Plan(NamedTuple):
    folder: Path
    sweep: Sweep
    cells: list[PlannedCell]  # of this command
    left: list[PlannedCell]  # those of them that are not complete
    runs: dict[str, Run]  # by variant, with what matching and measuring added
    paces: dict[str, Pace]  # by variant, of those with cells left


def planned(folder: Path, request: Request) -> Plan:
    """Determine what is to be run and how long it will take, and print it. Raises UserError where the folder holds
    another sweep, where budgets cannot be matched, and where it would take longer than max_minutes."""
    before = read_sweep(folder)
    if before is not None:
        check_same_sweep(folder, before, request)
    corpora = corpora_of(request.runs)
    added, lines = matched(request, corpora, before)
    for line in lines:
        print_stderr(line)
    first = {variant: cells[0] for variant, cells in by_variant(request.grid.cells).items()}
    runs = {variant: run_with(first[variant], added[variant]) for variant in first}
    cells = _planned_cells(request)
    left = [cell for cell in cells if not is_complete(folder / cell.name)]
    paces = timed({variant: runs[variant] for variant in by_variant(left)}, corpora)
    if request.settings.minutes is not None:
        for variant in measured(added, paces, request.settings.minutes):
            runs[variant] = run_with(first[variant], added[variant])
    plan = Plan(folder, combined(request, before, added, lines, runs), cells, left, runs, paces)
    if before is not None:
        check_same_settings(folder, before, plan.sweep)
    print_plan(plan, request.settings.max_minutes)
    return plan


def check_same_sweep(folder: Path, before: Sweep, request: Request) -> None:
    """Raise UserError where the folder's sweep is another one. More values of what varies are welcome: more seeds, or
    another variant."""
    now = {
        "settings": sorted(word for word in request.grid.fixed if not word.startswith(FREE)),
        "what varies": sorted(axis.key for axis in request.grid.axes),
        "match": request.settings.match,
        "minutes": request.settings.minutes,
    }
    then = {
        "settings": sorted(word for word in before.fixed if not word.startswith(FREE)),
        "what varies": sorted(before.axes),
        "match": before.match,
        "minutes": before.minutes,
    }
    for what, value in now.items():
        if value != then[what]:
            raise UserError(
                f"{folder} is another sweep, {what}: {_spelled(then[what])}, now {_spelled(value)}: give this one "
                "another name with sweep="
            )


def _spelled(value: Any) -> str:
    return (" ".join(value) or "none") if isinstance(value, list) else str(value)


def check_same_settings(folder: Path, before: Sweep, now: Sweep) -> None:
    """Raise UserError where a variant's settings are not what they were when the sweep began: conf/ has changed."""
    for variant, settings in before.settings.items():
        old = flatten_config(settings)
        new = flatten_config(now.settings[variant])
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{folder} was begun with {key}={old.get(key)} in {variant}, now that is {new.get(key)}: its runs "
                    "could not be compared; give this sweep another name with sweep="
                )


def corpora_of(runs: dict[str, Run]) -> dict[str, Prepared]:
    """The corpus of each variant, prepared once where several share it."""
    found: dict[str, Prepared] = {}
    corpora = {}
    for variant, run in runs.items():
        key = repr((run.data, run.tokenizer, run.cache_dir))
        found[key] = found.get(key) or prepared(run)
        corpora[variant] = found[key]
    return corpora


def matched(
    request: Request, corpora: dict[str, Prepared], before: Sweep | None
) -> tuple[dict[str, list[str]], list[str]]:
    """What matching the budgets adds to each variant's overrides, and the lines that say so. Variants that a sweep has
    already keep what they have."""
    overrides = {variant: cells[0].overrides for variant, cells in by_variant(request.grid.cells).items()}
    if before is None:
        known, to_match = {}, overrides
    else:
        known = before.added
        reference = next(cell for cell in before.cells if cell.variant == before.reference)
        new = {variant: words for variant, words in overrides.items() if variant not in known}
        to_match = {before.reference: reference.overrides, **new}
    if not request.settings.match or not to_match.keys() - known.keys():
        return {variant: list(known.get(variant, [])) for variant in {**known, **overrides}}, []
    sizes = {corpus.tokenizer.vocab_size for corpus in corpora.values()}
    if len(sizes) > 1:
        raise UserError(
            "match= compares models of one vocabulary, and these have several: use one tokenizer, or match=none"
        )
    found = match(to_match, request.settings.match, sizes.pop())
    return {**found.overrides, **known}, found.table


def timed(runs: dict[str, Run], corpora: dict[str, Prepared]) -> dict[str, Pace]:
    """Time a step of each variant. What is logged on the way, each run says again."""
    if runs:
        print_stderr(f"timing       a step of {counted(len(runs), 'variant')}, some seconds each")
    with level_of_log(logging.WARNING):
        return {variant: pace_of(run, corpora[variant]) for variant, run in runs.items()}


def measured(added: dict[str, list[str]], paces: dict[str, Pace], minutes: float) -> Iterator[str]:
    """Add the steps that fill the minutes to variants that were not measured before -> these."""
    for variant, pace in paces.items():
        if any(word.startswith("steps=") for word in added[variant]):
            continue
        steps = steps_within(minutes, pace.step)
        added[variant].append(f"steps={steps}")
        print_stderr(f"minutes      {variant}: {counted(steps, 'step')} take {minutes:g} minutes here")
        yield variant


def run_with(cell: Cell, added: Sequence[str]) -> Run:
    """The run of a cell with more overrides, as its process will compose it."""
    return compose(*cell.overrides, *added)


def combined(
    request: Request, before: Sweep | None, added: dict[str, list[str]], lines: list[str], runs: dict[str, Run]
) -> Sweep:
    """The sweep, with what the folder holds of it already."""
    cells = _planned_cells(request)
    settings = {variant: _settings(run) for variant, run in runs.items()}
    if before is not None:
        more = [cell for cell in cells if cell not in before.cells]
        cells = [*before.cells, *more]
        return before.model_copy(
            update={
                "cells": cells,
                "added": added,
                "settings": before.settings | settings,
                "matched": before.matched + lines,
            }
        )
    return Sweep(
        format=FORMAT,
        typed=request.typed,
        fixed=request.grid.fixed,
        axes=[axis.key for axis in request.grid.axes],
        match=request.settings.match,
        matched=lines,
        minutes=request.settings.minutes,
        hypothesis=request.settings.hypothesis,
        reference=cells[0].variant,
        added=added,
        settings=settings,
        cells=cells,
    )


def _planned_cells(request: Request) -> list[PlannedCell]:
    return [PlannedCell(**cell._asdict()) for cell in request.grid.cells]


def _settings(run: Run) -> dict[str, Any]:
    """All settings that make the variant, as they are read back."""
    return {name: value for name, value in json.loads(json.dumps(dump(run))).items() if name not in ("seed", "dry_run")}


def print_plan(plan: Plan, max_minutes: float | None) -> None:
    """Raises UserError where what is left would take longer than max_minutes."""
    seeds = sorted({cell.seed for cell in plan.cells if cell.seed is not None})
    over = f" over seeds {', '.join(map(str, seeds))}" if seeds else ""
    complete = len(plan.cells) - len(plan.left)
    done = f"; {complete} of them are done" if complete else ""
    runs = f"{counted(len(plan.cells), 'run')} of {counted(len(plan.runs), 'variant')}"
    print_stderr(f"sweep        {plan.folder}: {runs}{over}{done}")
    if not plan.left:
        return
    minutes = sum(seconds_of(plan, cell) for cell in plan.left) / 60
    each = ", ".join(f"{name} {pace.seconds(plan.runs[name]) / 60:.1f}" for name, pace in plan.paces.items())
    print_stderr(f"time         about {minutes:.1f} minutes in all; of a run {each}")
    if max_minutes is not None and minutes > max_minutes:
        raise UserError(
            f"max_minutes={max_minutes:g}: this sweep would take about {minutes:.1f} minutes: give fewer values or "
            "steps, or a larger max_minutes="
        )


def seconds_of(plan: Plan, cell: PlannedCell) -> float:
    """What is left of a cell, as predicted."""
    return plan.paces[cell.variant].seconds(plan.runs[cell.variant], steps_done(plan.folder / cell.name))
