"""The metrics of a run: metrics.jsonl, a row for each training step."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Required, TypedDict

from common.atomic_io import exists, open_regular, write_atomic
from common.errors import UserError, reason
from common.paths import raise_unreadable
from common.settings import MAX_COUNT

log = logging.getLogger("headroom")
MAX_ROW_BYTES = 2**20
MAX_FILE_BYTES = 2**34
MAX_NUMBER = 1e100  # in a row
PICTURE = "loss.png"  # the loss curve, drawn last of all: a run that has it is complete
UNSCORED = "unscored"  # the key of a row whose evaluation is still to come


class MetricRow(TypedDict, total=False):
    """A line of metrics.jsonl. A number that is not finite, or not known, is null; a key that is not Required may be
    missing.

    With log_attention=true, rows with a validation loss also have attention/layer_<i>/entropy, lowest_entropy and
    max_logit (training/attention_stats.py); with a mixture of experts experts/layer_<i>/load_<expert>
    (training/expert_loads.py).
    """

    step: Required[int]  # updates done, from 1; 0 for an evaluation before training
    train_loss: Required[float | None]  # nats per token: the mean over the step's batch
    train_bpb: float | None  # bits per byte of the same text
    tokens: int  # trained on so far, this step's included
    lr: float  # learning rate of the update; of AdamW's parameters, where Muon has others
    muon_lr: float  # learning rate of Muon's matrices
    bias_lr: float  # learning rate of biases, where it is not lr
    grad_norm: float | None  # of the whole gradient, before clipping
    skipped: bool  # true where loss or gradient were not finite, and nothing was updated
    uncounted: bool  # true where no target of the step was counted, as of prompts alone, and nothing was updated
    max_logit: float | None  # with optim.qk_clip: the largest attention score of the step
    clipped_heads: int  # with optim.qk_clip: heads whose scores were above it
    indexer_loss: float | None  # with an indexer: its KL divergence in nats, the layers' mean
    lowest_load: float | None  # of an expert, the tokens that chose it, relative to the mean of its layer
    highest_load: float | None  # with a mixture of experts, as the lowest
    balance_loss: float | None  # with its weight: the mean of the layers; 1 for even loads
    router_z_loss: float | None  # with its weight: the mean of the layers
    mtp_loss: float | None  # with model.mtp_depth: nats per token after the next one, which train_loss leaves out
    val_loss: float | None  # validation loss, nats per token, on val_tokens of the validation set
    val_bpb: float | None  # bits per byte of the same text
    val_accuracy: float | None  # share of them that have the largest logit, where the data has right answers
    val_tokens: int  # counted ones of eval_tokens; after the last step, of the whole validation set
    unscored: bool  # true where a signal cut the evaluation short: a resumed run makes up for it
    tokens_per_second: float  # of training alone, over the steps since the last look at the clock
    flops_per_second: float  # tokens_per_second times the model's FLOPs per token of training
    mfu: float | None  # model FLOPs utilization, a fraction of the device's peak
    data_seconds: float  # waited for the step's batch
    memory_bytes: int | None  # peak memory of the process, or of the GPU


class MetricsFile:
    """metrics.jsonl: one object per step, in order, each step once; before them, where evaluation came before training,
    one of step 0."""

    def __init__(self, path: Path, resume_after: int, writes: bool = True):
        """Rows after the step a run resumes from are dropped: their steps are recomputed. writes: false in processes
        that train beside the one that writes."""
        self.path = path
        rows = read_metrics(path, resume_after) if resume_after else []
        self.past: list[MetricRow] = [row for row in rows if row["step"]]  # of training
        self.before: MetricRow | None = next((row for row in rows if not row["step"]), None)
        self.writes = writes
        try:
            if writes:
                write_atomic(path, "".join(map(_line, rows)).encode())
            self.file = open(path if writes else os.devnull, "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} cannot be written: {reason(error)}") from None
        if len(self.past) < resume_after:
            log.warning(f"{path} has lost rows: it holds {len(self.past)} of the {resume_after} steps done")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was reported when it was
            self.file.close()

    def write(self, row: MetricRow) -> None:
        with self._writing():
            self.file.write(_line(row))
            self.file.flush()

    def begin(self, row: MetricRow) -> None:
        """Write the row of step 0: the evaluation before training."""
        self.before = row
        self.write(row)

    def complete(self, scored: Mapping[str, Any]) -> MetricRow:
        """Add the validation scores that the last of the past rows lacks, before others follow -> the row."""
        self.past[-1] = {key: value for key, value in self.past[-1].items() if key != UNSCORED} | dict(scored)
        if not self.writes:
            return self.past[-1]
        with self._writing():
            self.file.close()
            before = [] if self.before is None else [self.before]
            write_atomic(self.path, "".join(map(_line, before + self.past)).encode())
            self.file = open(self.path, "a")  # noqa: SIM115
        return self.past[-1]

    def sync(self) -> None:
        """Flush to the disk: all rows are there when it returns."""
        with self._writing():
            if self.writes:
                os.fsync(self.file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises UserError where the file cannot be written."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {reason(error)}; what was saved stands: make room, then resume"
            ) from None


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path, last: int = MAX_COUNT) -> list[MetricRow]:
    """Rows written so far, in order, up to that of step `last`, each step once; what is not a row is left out, such as
    a line that a kill cut short. Raises UserError where the file cannot be read."""
    rows = []
    try:
        if not exists(path):
            return []
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise UserError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes, which the metrics of no run are")
            while line := file.readline(MAX_ROW_BYTES):  # a longer one comes in pieces, none of which is a row
                row = _row(line)
                if row is not None and (rows[-1]["step"] if rows else -1) < row["step"] <= last:
                    rows.append(row)
    except OSError as error:
        raise_unreadable(path, error, "make it readable, or move it away")
    return rows


def ended_skipping(path: Path) -> bool:
    """Whether the last update of a run was skipped, as where it diverged. Reads the end of the file alone; False where
    that cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_ROW_BYTES))
            rows = [row for row in map(_row, file.read().splitlines()[-2:]) if row is not None]
    except OSError:
        return False
    return bool(rows) and bool(rows[-1].get("skipped"))


def _row(line: bytes) -> MetricRow | None:
    """Parse a line -> None for what no run writes."""
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
    """Whether it is a number or null. Not one that arithmetic or a picture would fail at: no float32 is as large."""
    return value is None or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)


def unscored(rows: Sequence[MetricRow], step: int) -> bool:
    """Whether a signal cut the evaluation after that step short: a resumed run makes up for it."""
    return any(row["step"] == step and UNSCORED in row for row in rows)
