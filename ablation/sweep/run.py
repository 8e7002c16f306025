"""A sweep: one command, a run of each combination, continued by the same command.

python train.py -m attention=mha,gqa,mla seed=1,2,3 match=params

Everything that can be wrong is refused before the first run: every cell is composed, the corpus prepared, budgets are
matched, a step of each variant is timed. Then the cells run one after the other, each in a process of its own.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ablation.outcome import exit_in_words, is_complete, outcome_of
from ablation.sweep.grid import key_of
from ablation.sweep.launch import Interrupted, Launcher, Relay, wait_until_free
from ablation.sweep.plan import Plan, planned, seconds_of
from ablation.sweep.request import default_name, requested
from ablation.sweep.stored import SWEEPS, PlannedCell, read_outcomes, record_outcome, sweep_command, write_sweep
from common import process
from common.atomic_io import exists, make_folder
from common.console import about, counted, to_stderr
from common.errors import UserError, reason
from common.invocation import command
from common.lock import lock
from common.overrides import format_override
from common.streams import print_stderr
from training.run.config import OF_SWEEPS


def run_sweep(typed: Sequence[str], launcher: Launcher | None = None) -> int:
    """typed: the overrides on the command line, without -m; launcher: what runs a cell, in the place of a process ->
    the exit code: 2 where a cell failed or diverged, and that of the signal that stopped it. Raises UserError for what
    can be refused before the first run."""
    process.end_by_unwinding()
    to_stderr()
    request = requested(typed)
    folder = SWEEPS / (request.settings.sweep or default_name(request))
    with locked(folder):
        plan = planned(folder, request)
        if next(iter(plan.runs.values())).dry_run:
            print_stderr("dry run      nothing was trained: leave dry_run=true out to train")
            return 0
        write_sweep(folder, plan.sweep)
        with Relay() as relay:
            try:
                run_cells(plan, launcher or relay.launch, relay)
            except Interrupted as stop:
                print_stderr(f"the sweep stopped ({stop}); continue it with: {sweep_command(plan.typed)}")
                return 128 + stop.number
    return finished(plan)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the sweep's folder, and hold it for this process. A folder in which nothing came to be is removed."""
    try:
        make_folder(folder)
        sweep_lock = lock(folder / ".lock", f"another process runs the sweep {folder}: wait for it, or stop it first")
    except OSError as error:
        raise UserError(f"the sweep's folder {folder} cannot be made: {reason(error)}") from None
    with sweep_lock:
        try:
            yield
        finally:
            if folder.is_dir() and os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # other sweeps are in it
                    SWEEPS.rmdir()


def run_cells(plan: Plan, launcher: Launcher, relay: Relay) -> None:
    """Run what is left, one after the other. A line before each says how long the rest will take, by what those before
    it took."""
    numbers = {cell.name: number for number, cell in enumerate(plan.cells, 1)}
    seconds = {cell.name: seconds_of(plan, cell) for cell in plan.left}
    spent = predicted = 0.0  # of cells that finished
    while seconds:
        name = next(iter(seconds))
        left = about(sum(seconds.values()) * (spent / predicted if predicted else 1.0))
        print_stderr(f"{numbers[name]} of {len(plan.cells)}: {name.replace(',', ' ')}, about {left} left")
        begun = time.monotonic()
        run_cell(plan, plan.cells[numbers[name] - 1], launcher)
        relay.check()
        if is_complete(plan.folder / name):
            spent += time.monotonic() - begun
            predicted += seconds[name]
        del seconds[name]


def run_cell(plan: Plan, cell: PlannedCell, launcher: Launcher) -> None:
    """Begin the run of a cell, or go on with it; how it ended is recorded."""
    folder = plan.folder / cell.name
    words = words_of(plan.sweep.overrides_of(cell), folder)
    outcome = None
    if exists(folder / "config.yaml"):
        words = [format_override("resume", str(folder))]
    try:
        wait_until_free(folder)
        code = launcher(words)
        outcome = None if is_complete(folder) else exit_in_words(code)
    except UserError as fault:
        print_stderr(f"error: {fault}")
        outcome = str(fault)
    record_outcome(plan.folder, cell.name, outcome)


def words_of(overrides: Sequence[str], folder: Path) -> list[str]:
    """The overrides of one run: those of the sweep itself are taken back where an experiment's file gives them."""
    taken_back = []
    if any(key_of(word) == "experiment" for word in overrides):
        taken_back = [f"{name}={unset or 'null'}" for name, unset in {"minutes": None, **OF_SWEEPS}.items()]
    return [*overrides, *taken_back, format_override("run_dir", str(folder))]


def finished(plan: Plan) -> int:
    """Print how the sweep ended -> its exit code."""
    outcomes = read_outcomes(plan.folder)
    bad = {}
    for cell in plan.cells:
        found = outcome_of(plan.folder / cell.name, outcomes.get(cell.name))
        if found.state != "finished":
            bad[cell.name] = f"{found.state}: {found.detail}"
    for name, text in bad.items():
        print_stderr(f"{name} {text}")
    good = len(plan.cells) - len(bad)
    print_stderr(f"{good} of {counted(len(plan.cells), 'run')} finished{'; the report:' if good else ''}")
    if good:
        print_stderr(f"  {command('compare.py', str(plan.folder))}")
    return 2 if bad else 0
