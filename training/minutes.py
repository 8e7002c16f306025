"""minutes=: a budget of training time on this machine, turned into a number of steps before the first of them.

The steps are then the run's, as if steps= had been given: its schedule ends with them, and a resumed run has the same.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.console import counted
from common.errors import UserError
from common.settings import MAX_COUNT
from data.batches import check_split_lengths
from data.shards.prepare import Prepared, prepare
from runtime.device import choose_device, set_determinism, set_threads
from runtime.precision import choose_precision
from training.monitor.mfu import flops_of
from training.run.config import Run
from training.step_time import time_step

MAX_MINUTES = 1_000_000  # two years
log = logging.getLogger("headroom")


def check_one_process(minutes: Any, parallel: Any) -> None:
    """Raise UserError where several processes are to train for so many minutes."""
    if isinstance(parallel, Mapping) and "processes" in parallel:
        raise UserError(f"minutes={minutes} is measured in one process, which parallel= is not: give steps=")


def steps_for(given: Mapping[str, Any], run: Run, typed: Sequence[str]) -> int:
    """The steps of a run that fill its minutes. given: the settings of the command; typed: its overrides. Raises
    UserError."""
    minutes = check_minutes(given["minutes"])
    other = next((word for word in typed if word.lstrip("+").startswith(("steps=", "resume="))), None)
    if other is not None:
        raise UserError(f"minutes={minutes:g} is in the place of {other}: leave one of them out")
    length = run.model.context_length
    corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir), window=length + 1)
    check_split_lengths(corpus, length)
    steps = steps_within(minutes, seconds_per_step(run, corpus))
    log.info(f"{counted(steps, 'step')} take {minutes:g} minutes here, evaluation and saving not counted")
    return steps


def check_minutes(minutes: Any) -> float:
    """Raises UserError for what is no number of minutes."""
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"minutes={minutes}: give a number of more than 0 and at most {MAX_MINUTES:,}")
    return float(minutes)


def seconds_per_step(run: Run, corpus: Prepared) -> float:
    """Time a step of a run on this machine, on made-up tokens."""
    set_determinism(run.deterministic)
    set_threads(run.threads)
    device = choose_device(run.device)
    run.model.check_training(device)
    run = run.model_copy(update={"precision": choose_precision(run.precision, device)})
    flops = flops_of(run.model, corpus, run.document_mask)
    return time_step(run, corpus.tokenizer.vocab_size, flops, device).seconds


def steps_within(minutes: float, seconds: float) -> int:
    """The steps of so many seconds each that take so many minutes. Raises UserError where not one does."""
    steps = int(minutes * 60 / seconds)
    if not steps:
        raise UserError(f"minutes={minutes:g}: one step takes {seconds:.1f} s here: give more minutes")
    return min(steps, MAX_COUNT)
