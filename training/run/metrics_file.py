"""metrics.jsonl: what a run writes down while it trains, a row for each step."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.atomic_io import exists, open_regular, write_atomic
from common.errors import UserError, reason
from common.paths import raise_unreadable

log = logging.getLogger("headroom")
MOST_STEPS = 2**40  # of a run
LONGEST_ROW = 2**20  # bytes; what is longer is no row of metrics
LARGEST_METRICS = 2**34  # bytes
LARGEST_NUMBER = 1e100  # in a row
PICTURE = "loss.png"  # the curve of these, drawn last of all, so that it tells a complete run
UNSCORED = "unscored"  # in a row: true where its validation score is still to come


class MetricsFile:
    """metrics.jsonl: one object per step, in order, each step once; before them, where validation came before training,
    one of step 0. A number that is not finite, or not known, is null."""

    def __init__(self, path: Path, resume_after: int):
        """Rows after the step a run resumes from belong to a future that is computed anew: they are dropped."""
        self.path = path
        kept = read_metrics(path, resume_after) if resume_after else []
        self.past = [row for row in kept if row["step"]]  # of training; step 0 is what was there before
        try:
            write_atomic(path, "".join(map(_line, kept)).encode())
            self.file = open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} cannot be written: {reason(error)}") from None
        self.before = next((row for row in kept if not row["step"]), None)
        if len(self.past) < resume_after:
            log.warning(f"{path} has lost rows: it holds {len(self.past)} of the {resume_after} steps done")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been said
            self.file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        with self._complaint():
            self.file.write(_line(row))
            self.file.flush()

    def begin(self, row: Mapping[str, Any]) -> None:
        """What was measured before the first step."""
        self.before = dict(row)
        self.write(row)

    def complete(self, scored: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the last of the past rows the validation score that it lacks, before others follow -> the row."""
        self.past[-1] = {key: value for key, value in self.past[-1].items() if key != UNSCORED} | dict(scored)
        with self._complaint():
            self.file.close()
            before = [] if self.before is None else [self.before]
            write_atomic(self.path, "".join(map(_line, before + self.past)).encode())
            self.file = open(self.path, "a")  # noqa: SIM115
        return self.past[-1]

    def sync(self) -> None:
        """All rows are on the disk when it returns."""
        with self._complaint():
            os.fsync(self.file.fileno())

    @contextmanager
    def _complaint(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {reason(error)}; what was saved stands: make room, then resume"
            ) from None


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path, last: int = MOST_STEPS) -> list[dict[str, Any]]:
    """The rows written so far, in order, up to that of step `last`, each step once; what is not a row is left out, such
    as a line that a kill cut short. Raises UserError where the file cannot be read."""
    rows = []
    try:
        if not exists(path):
            return []
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_METRICS:
                raise UserError(f"{path} is larger than {LARGEST_METRICS:,} bytes, which the metrics of no run are")
            while line := file.readline(LONGEST_ROW):  # a longer one comes in pieces, none of which is a row
                row = _row(line)
                if row is not None and (rows[-1]["step"] if rows else -1) < row["step"] <= last:
                    rows.append(row)
    except OSError as error:
        raise_unreadable(path, error, "make it readable, or move it away")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """None for what no run writes."""
    if not line.startswith(b"{"):  # seen at once, where a line is long
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_number, row.values())):
        return None
    losses = (row.get(name) for name in ("train_loss", "val_loss", "val_tokens"))
    fits = "train_loss" in row and type(row.get("step")) is int and not any(isinstance(loss, bool) for loss in losses)
    return row if fits else None


def _is_number(value: Any) -> bool:
    """Or null. Not what arithmetic or a picture would fail at: no float32 is as large."""
    return value is None or (isinstance(value, int | float) and abs(value) < LARGEST_NUMBER)


def unscored(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether a signal cut the evaluation after that step short, which is to be made when the run goes on."""
    return any(row["step"] == step and UNSCORED in row for row in rows)
