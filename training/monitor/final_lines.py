"""The final lines of a run. Its checkpoints are looked at for them: which is the best, and how it becomes a longer
run."""

import logging
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from model.score import Score
from training.evaluate import Evaluation
from training.metrics_file import MetricRow
from training.monitor import summary
from training.run.checkpoint import best
from training.run.config import Run
from training.run.folder import checkpoint_paths, step_of

log = logging.getLogger("headroom")


def final_lines(
    run: Run, folder: Path, evaluation: Evaluation, before: MetricRow | None, speed: list[str]
) -> list[str]:
    """Scores, speed and next commands of a complete run. before: the row of the evaluation before training, if there
    was one. speed: its line, where this process made steps."""
    return [
        summary.validation_line(evaluation.reported),
        *summary.before_line(before, evaluation.prefix),
        *_best_line(run, folder, evaluation.prefix),
        *speed,
        *summary.next_lines(folder, _longer_run(run, folder)),
    ]


def _best_line(run: Run, folder: Path, prefix: Score) -> Iterator[str]:
    try:
        found = best(folder)
    except UserError as fault:
        log.warning(f"{fault}; so which checkpoint is the best is not known")
        return
    if found is not None and found.manifest.step != run.steps:
        yield summary.best_line(folder, found.manifest.step, found.manifest.val_loss, prefix.tokens)


def _longer_run(run: Run, folder: Path) -> str:
    start = summary.cooldown_start(run)
    try:
        before = [] if start is None else [path.name for path in checkpoint_paths(folder) if step_of(path) <= start]
    except UserError as fault:
        return f"(whether a longer run can go on from here is not known: {fault})"
    return summary.longer_run(run, folder, before[-1] if before else None)
