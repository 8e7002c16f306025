"""The plan of a sweep: budgets matched, a step of each variant timed, and all of it printed, before any training."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ablation.match import match
from ablation.outcome import is_complete, outcome_of
from ablation.sweep.grid import key_of
from ablation.sweep.pace import Pace, paces_of
from ablation.sweep.request import Request, settings_of
from ablation.sweep.stored import FORMAT, PlannedCell, Sweep, by_variant, read_outcomes, read_sweep
from common.console import about, counted
from common.errors import UserError
from common.streams import print_stderr
from data.batches import check_split_lengths
from data.shards.prepare import Prepared, prepare
from training.minutes import steps_within
from training.run.checkpoint import steps_done
from training.run.config import Run, dump, flatten_config
from training.run.folder import resume_command
from training.run.start import compose_start

OF_CELL = ("seed", "init_from", "dry_run")  # what a variant's cells may differ in: each seed may have a base of its own


class Plan(NamedTuple):
    folder: Path
    sweep: Sweep
    typed: list[str]  # the overrides of this command
    cells: list[PlannedCell]  # of this command
    left: list[PlannedCell]  # those of them that are to be run
    runs: dict[str, Run]  # by variant, with what matching and measuring added
    paces: dict[str, Pace]  # by variant, of those with cells left


def planned(folder: Path, request: Request) -> Plan:
    """Determine what is to be run and how long it will take, and print it. Raises UserError where the folder holds
    another sweep, where budgets cannot be matched, and where it would take longer than max_minutes."""
    before = read_sweep(folder)
    if before is not None:
        check_same_sweep(folder, before, request)
        check_same_settings(folder, before)
    added = matched(request, corpora_of(request.runs), before)
    first = {variant: cells[0].overrides for variant, cells in by_variant(request.grid.cells).items()}
    left = [cell for cell in request.grid.cells if is_to_be_run(folder, cell.name)]
    if left:
        print_stderr(f"timing       a step of {counted(len(by_variant(left)), 'variant')}, some seconds each")
    paces = paces_of({variant: [*first[variant], *added[variant]] for variant in by_variant(left)})
    if request.settings.minutes is not None:
        add_steps(added, paces, request.settings.minutes)
    runs = {variant: compose_start(*first[variant], *added[variant]) for variant in first}
    sweep = combined(request, before, added, runs)
    plan = Plan(folder, sweep, request.typed, request.grid.cells, left, runs, paces)
    print_plan(plan, request.settings.max_minutes)
    return plan


def is_to_be_run(folder: Path, name: str) -> bool:
    """Whether a cell is not complete. One that diverged is passed over: it would again."""
    if is_complete(folder / name):
        return False
    found = outcome_of(folder / name, read_outcomes(folder).get(name))
    if found.state == "diverged":
        again = resume_command(folder / name)
        print_stderr(f"passed over  {name}, which diverged {found.detail}: {again} gives it another chance")
    return found.state != "diverged"


def check_same_sweep(folder: Path, before: Sweep, request: Request) -> None:
    """Raise UserError where the folder's sweep is another one. More values of what varies are welcome: more seeds, or
    another variant."""
    settings = request.settings
    compared = {
        "settings": (sorted(before.fixed), settings_of(request.grid)),
        "what varies": (sorted(before.varying), sorted(one.key for one in request.grid.varying)),
        "match": (before.match, settings.match),
        "minutes": (before.minutes, settings.minutes),
        "hypothesis": (before.hypothesis, settings.hypothesis or before.hypothesis),
    }
    for what, (then, now) in compared.items():
        if then != now:
            raise UserError(
                f"{folder} is another sweep, {what}: {_spelled(then)}, now {_spelled(now)}: give this one another name "
                "with sweep="
            )


def _spelled(value: Any) -> str:
    return (" ".join(value) or "none") if isinstance(value, list) else str(value)


def check_same_settings(folder: Path, before: Sweep) -> None:
    """Raise UserError where the settings of one of the sweep's variants are not what they were: conf/ has changed."""
    for variant, cells in by_variant(before.cells).items():
        old = flatten_config(before.settings[variant])
        new = flatten_config(_settings(compose_start(*before.overrides_of(cells[0]))))
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{folder} was begun with {key}={old.get(key)} in {variant}, now that is {new.get(key)}: runs of "
                    "both could not be compared; give this sweep another name with sweep="
                )


def corpora_of(runs: dict[str, Run]) -> dict[str, Prepared]:
    """The corpus of each variant, prepared once where several share it. Raises UserError."""
    found: dict[str, Prepared] = {}
    corpora = {}
    for variant, run in runs.items():
        key, length = repr((run.data, run.tokenizer, run.cache_dir)), run.model.context_length
        if key not in found:
            found[key] = prepare(run.data, run.tokenizer, Path(run.cache_dir), window=length + 1)
        check_split_lengths(found[key], length)
        corpora[variant] = found[key]
    return corpora


def matched(request: Request, corpora: dict[str, Prepared], before: Sweep | None) -> dict[str, list[str]]:
    """What matching the budgets adds to each variant's overrides, printed. Variants that a sweep has already keep what
    they have."""
    overrides = {variant: cells[0].overrides for variant, cells in by_variant(request.grid.cells).items()}
    known = {} if before is None else before.added
    new = {variant: words for variant, words in overrides.items() if variant not in known}
    if not request.settings.match or not new:
        return {variant: list(known.get(variant, [])) for variant in {**known, **overrides}}
    sizes = {corpus.tokenizer.vocab_size for corpus in corpora.values()}
    if len(sizes) > 1:
        raise UserError("match= compares models of one vocabulary: use one tokenizer for all variants, or match=none")
    if before is not None:
        new = {before.reference: by_variant(before.cells)[before.reference][0].overrides, **new}
    found = match(new, request.settings.match, sizes.pop())
    for line in found.table:
        print_stderr(line)
    return {**{variant: list(words) for variant, words in found.overrides.items()}, **known}


def add_steps(added: dict[str, list[str]], paces: dict[str, Pace], minutes: float) -> None:
    """Add the steps that fill the minutes to what was added to variants, where that was not done before."""
    for variant, pace in paces.items():
        if any(key_of(word) == "steps" for word in added[variant]):
            continue
        steps = steps_within(minutes, pace.step)
        added[variant].append(f"steps={steps}")
        print_stderr(f"minutes      {variant}: {counted(steps, 'step')} take {minutes:g} minutes here")


def combined(request: Request, before: Sweep | None, added: dict[str, list[str]], runs: dict[str, Run]) -> Sweep:
    """The sweep, with what the folder holds of it already."""
    cells = request.grid.cells
    settings = {variant: _settings(run) for variant, run in runs.items()}
    if before is None:
        return Sweep(
            format=FORMAT,
            commands=[request.typed],
            fixed=settings_of(request.grid),
            varying=[one.key for one in request.grid.varying],
            match=request.settings.match,
            minutes=request.settings.minutes,
            hypothesis=request.settings.hypothesis,
            reference=cells[0].variant,
            added=added,
            settings=settings,
            cells=cells,
        )
    known = {cell.name for cell in before.cells}
    more = [cell for cell in cells if cell.name not in known]
    commands = [*before.commands, request.typed] if more else before.commands
    changes = {"commands": commands, "cells": [*before.cells, *more], "added": before.added | added}
    return before.model_copy(update=changes | {"settings": before.settings | settings})


def _settings(run: Run) -> dict[str, Any]:
    """All settings that make the variant, as they are read back."""
    return {name: value for name, value in json.loads(json.dumps(dump(run))).items() if name not in OF_CELL}


def print_plan(plan: Plan, max_minutes: float | None) -> None:
    """Raises UserError where what is left would take longer than max_minutes."""
    seeds = sorted({cell.seed for cell in plan.cells if cell.seed is not None})
    over = f" over seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    done = len(plan.cells) - len(plan.left)
    others = f"; {done} of them not to be run again" if done else ""
    runs = f"{counted(len(plan.cells), 'run')} of {counted(len(plan.runs), 'variant')}"
    print_stderr(f"sweep        {plan.folder}: {runs}{over}{others}")
    if len({repr((run.data, run.tokenizer)) for run in plan.runs.values()}) > 1:
        print_stderr("texts        the variants have not the same text and vocabulary: compare.py will want --force")
    if not plan.left:
        return
    seconds = sum(seconds_of(plan, cell) for cell in plan.left)
    each = ", ".join(f"{name} {about(pace.seconds(plan.runs[name]))}" for name, pace in plan.paces.items())
    print_stderr(f"time         about {about(seconds)} in all; of a run {each}")
    if max_minutes is not None and seconds > 60 * max_minutes:
        raise UserError(
            f"max_minutes={max_minutes:g}: this sweep would take about {about(seconds)}: give fewer values or steps, "
            "or a larger max_minutes="
        )


def seconds_of(plan: Plan, cell: PlannedCell) -> float:
    """What is left of a cell, as predicted."""
    return plan.paces[cell.variant].seconds(plan.runs[cell.variant], steps_done(plan.folder / cell.name))
