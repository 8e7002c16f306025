"""What became of a run, by its folder alone."""

import os
import signal
from pathlib import Path
from typing import Literal, NamedTuple

from common.atomic_io import exists
from common.console import counted
from common.errors import UserError, reason
from training.metrics_file import UNSCORED, MetricRow, read_metrics
from training.monitor.guard import Guard
from training.run.checkpoint import is_finished, steps_done
from training.run.config import Run
from training.run.folder import read_config

METRICS = "metrics.jsonl"
State = Literal["finished", "diverged", "failed", "unfinished", "missing", "damaged", "altered"]


class Outcome(NamedTuple):
    state: State
    detail: str  # in words, for what is not finished


def outcome_of(folder: Path, recorded: str | None = None) -> Outcome:
    """recorded: how the process ended that did not finish, if that is known."""
    try:
        if not exists(folder / "config.yaml"):
            return Outcome("failed", recorded) if recorded else Outcome("missing", "not begun")
        tree, _ = read_config(folder)
        rows = read_metrics(folder / METRICS)
        last, saved = rows[-1]["step"] if rows else 0, steps_done(folder)
        if last < saved:
            return Outcome("damaged", f"{METRICS} ends at step {last:,}, the run came to step {saved:,} at least")
        return outcome_of_rows(Run.from_tree(tree), rows, recorded)
    except UserError as fault:
        return Outcome("damaged", str(fault))
    except OSError as error:
        return Outcome("damaged", f"{folder} cannot be read: {reason(error)}")


def outcome_of_rows(run: Run, rows: list[MetricRow], recorded: str | None = None) -> Outcome:
    if final_row(run, rows) is not None:
        return Outcome("finished", "")
    done = rows[-1]["step"] if rows else 0
    if done == run.steps and UNSCORED not in rows[-1]:
        return Outcome("damaged", f"the last row of {METRICS} holds no validation loss")
    where = f"at step {done:,} of {run.steps:,}"
    if Guard((row for row in rows if row["step"]), run.max_skipped_updates).diverged_before:
        return Outcome("diverged", f"{where}, after {counted(run.max_skipped_updates, 'skipped update')} in a row")
    if recorded:
        return Outcome("failed", f"{recorded}, {where}")
    return Outcome("unfinished", f"stopped {where}")


def final_row(run: Run, rows: list[MetricRow]) -> MetricRow | None:
    """The row of the last step, with the loss on the whole validation set; None where the run has not come so far."""
    last = rows[-1] if rows else None
    scored = last is not None and last["step"] == run.steps and UNSCORED not in last
    return last if scored and last.get("val_loss") is not None else None


def is_complete(folder: Path) -> bool:
    """Whether nothing is left to do: the last act of a run is to draw loss.png, which a resumed one removes first."""
    return outcome_of(folder).state == "finished" and is_finished(folder)


def exit_in_words(code: int) -> str:
    """An exit code as subprocess gives it: -9 where signal 9 ended the process."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ": is there enough memory?" if name == "SIGKILL" and os.name == "posix" else ""
    return f"killed by {name}{hint}"
