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
from ablation.sweep.launch import Interrupted, Launcher, launch, wait_until_free
from ablation.sweep.plan import Plan, planned, seconds_of
from ablation.sweep.request import default_name, requested
from ablation.sweep.stored import SWEEPS, PlannedCell, continue_command, read_outcomes, record_outcome, write_sweep
from common import process
from common.atomic_io import exists, make_folder
from common.console import counted, to_stderr
from common.errors import UserError, reason
from common.invocation import command
from common.lock import lock
from common.overrides import format_override
from common.streams import print_stderr
from training.run.config import OF_COMMANDS, OF_SWEEPS
from training.run.folder import resume_command


def run_sweep(typed: Sequence[str], launcher: Launcher = launch) -> int:
    """typed: the overrides on the command line, without -m -> the exit code: 2 where a cell failed or diverged, and
    that of the signal that stopped it. Raises UserError for what can be refused before the first run."""
    process.end_by_unwinding()
    to_stderr()
    request = requested(typed)
    folder = SWEEPS / (request.settings.sweep or default_name(request))
    with locked(folder):
        plan = planned(folder, request)
        dry_run = next(iter(plan.runs.values())).dry_run
        if dry_run:
            print_stderr("dry run      nothing was trained: leave dry_run=true out to train")
            return 0
        write_sweep(folder, plan.sweep)
        return run_cells(plan, launcher)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the sweep's folder, and hold it for this process. A folder in which nothing came to be is removed."""
    try:
        make_folder(folder)
        held = lock(folder / ".lock", f"another process runs the sweep {folder}: wait for it, or stop it first")
    except OSError as error:
        raise UserError(f"the sweep's folder {folder} cannot be made: {reason(error)}") from None
    with held:
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # other sweeps are in it
                    SWEEPS.rmdir()


def run_cells(plan: Plan, launcher: Launcher) -> int:
    """Run what is left, one after the other -> the exit code. A line before each says how long the rest will take, by
    what those before it took."""
    numbers = {cell.name: number for number, cell in enumerate(plan.cells, 1)}
    seconds = [seconds_of(plan, cell) for cell in plan.left]
    begun = time.monotonic()
    for i, cell in enumerate(plan.left):
        pace = (time.monotonic() - begun) / sum(seconds[:i]) if i else 1.0
        where = f"{numbers[cell.name]} of {len(plan.cells)}"
        print_stderr(f"{where}: {cell.name.replace(',', ' ')}, about {sum(seconds[i:]) * pace / 60:.0f} min left")
        try:
            run_cell(plan, cell, launcher)
        except Interrupted as stop:
            print_stderr(f"the sweep stopped within run {where}; continue it with: {continue_command(plan.sweep)}")
            return 128 + stop.number
    return finished(plan)


def run_cell(plan: Plan, cell: PlannedCell, launcher: Launcher) -> None:
    """Begin the run of a cell, or go on with it; how it ended is recorded."""
    folder = plan.folder / cell.name
    recorded = read_outcomes(plan.folder).get(cell.name)
    if exists(folder / "config.yaml"):
        found = outcome_of(folder, recorded)
        if found.state == "diverged":
            print_stderr(f"it diverged {found.detail}; passed over: {resume_command(folder)} gives it another chance")
            return
        wait_until_free(folder)
        words = [format_override("resume", str(folder))]
    else:
        words = words_of(plan.sweep.overrides_of(cell), folder)
    code = launcher(words)
    record_outcome(plan.folder, cell.name, None if is_complete(folder) else exit_in_words(code))


def words_of(overrides: Sequence[str], folder: Path) -> list[str]:
    """The overrides of one run: those of the sweep itself are taken back where an experiment's file gives them."""
    words = [word for word in overrides if key_of(word) not in OF_COMMANDS]
    if any(key_of(word) == "experiment" for word in words):
        words += [f"{name}={unset or 'null'}" for name, unset in {"minutes": None, **OF_SWEEPS}.items()]
    return [*words, format_override("run_dir", str(folder))]


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
    print_stderr(f"{len(plan.cells) - len(bad)} of {counted(len(plan.cells), 'run')} finished; the report:")
    print_stderr(f"  {command('compare.py', str(plan.folder))}")
    return 2 if bad else 0
