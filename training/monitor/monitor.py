"""Monitor: observes a training run, writes its metrics and shows its progress. It decides nothing."""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from common import process
from data.batches import Batch, documents_of_step
from data.shards.prepare import Prepared
from runtime.memory import peak_memory
from training.evaluate import Evaluation
from training.loggers.base import MetricSink
from training.measure import Measured
from training.metrics_file import PICTURE, UNSCORED, MetricRow, MetricsFile, unscored
from training.monitor import summary
from training.monitor.final_lines import final_lines
from training.monitor.guard import Guard
from training.monitor.mfu import flops_of, peak_flops
from training.monitor.plot import plot_loss
from training.monitor.plot_experts import plot_experts
from training.monitor.profiler import Profile
from training.monitor.progress import ProgressLine
from training.monitor.timer import TrainingTimer
from training.run.config import Run, dump
from training.state import TrainState
from training.step import StepResult

log = logging.getLogger("headroom")
MAX_DOCUMENTS_NAMED = 4
OF_EVERY_STEP = 5  # numbers, before those that are reported
COUNTS = frozenset({"clipped_heads"})  # of what is reported
FLUSH_SECONDS = 0.5  # reading a loss waits for the device, so it is not done at every step


class PendingRow(NamedTuple):
    """A step whose numbers are still on the device."""

    row: MetricRow
    numbers: Tensor  # loss, gradient norm, bytes and number of counted targets, skipped; and what is reported
    reported: tuple[str, ...]  # names of the latter


class Monitor:
    """Writes metrics.jsonl and the logger's rows, shows progress, watches for divergence, and times training. Within
    its `with` block its files are open and its live line is shown."""

    def __init__(self, run: Run, folder: Path, corpus: Prepared, measured: Measured, state: TrainState):
        """measured: for the opening lines. state: that the first step of this process begins with."""
        self.world = world = state.world  # the processes that train the run, of which the first writes
        done, device = state.step, state.device
        self.run = run
        self.folder = folder
        self.corpus = corpus
        self.measured = measured
        self.device = device
        self.byte_lengths = torch.from_numpy(corpus.tokenizer.byte_lengths).to(device)  # (V,)
        self.done = done
        self.metrics = MetricsFile(folder / "metrics.jsonl", resume_after=done, writes=world.is_first)
        self.unscored = unscored(self.metrics.past, done)  # a signal cut the evaluation after the last step short
        self.last_reported_step = done - self.unscored
        self.guard = Guard(self.metrics.past, run.max_skipped_updates)
        self.sink = run.logger.open(folder, dump(run)) if world.is_first else MetricSink()
        self.progress = ProgressLine(done, run.steps)
        self.profile = Profile(run.profile_steps if world.is_first else 0, folder, device, done, run.steps)
        self.timer = TrainingTimer(device)
        self.pending: list[PendingRow] = []
        self.flops_per_token = flops_of(run.model, corpus, run.document_mask).training()
        self.peak_flops = peak_flops(device, run.precision, run.peak_flops)  # per second

    def __enter__(self) -> Self:
        if self.done < self.run.steps and self.world.is_first:
            with suppress(OSError):  # such as a folder, which is no picture
                (self.folder / PICTURE).unlink()  # it marks a run as finished
        self.progress.start()
        self.profile.start()
        kind = self.device.type
        opening = summary.opening_lines(self.run, self.folder, self.corpus, kind, self.done, self.measured)
        for line in () if process.in_sweep else opening:
            self.print_line(line)
        self.timer.restart()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None:
                self.flush()
            if kind not in (None, KeyboardInterrupt) and self.done < self.run.steps:
                self.draw_picture()
        finally:
            self.progress.stop()
            self.profile.close()
            self.metrics.close()
            self.sink.close()

    def record_initial_evaluation(self, evaluation: Evaluation) -> None:
        """Call before the first step, with the evaluation of the weights that training begins with."""
        row = MetricRow(step=0, tokens=0, train_loss=None, **evaluation.columns())
        self.metrics.begin(row)
        self.sink.write(row)
        self.print_line(summary.score_line("before step 1", evaluation.reported))
        self.timer.restart()

    def record_late_evaluation(self, evaluation: Evaluation) -> None:
        """Call before other steps, with the evaluation that the last one lacks."""
        row = self.metrics.complete(evaluation.columns())
        self.sink.write(row)
        self.unscored = False
        self.last_reported_step = row["step"]
        self.print_line(summary.score_line(f"step {row['step']}", evaluation.reported))
        self.timer.restart()

    @contextmanager
    def timing_data(self) -> Iterator[None]:
        """A context around the wait for a batch, with which every step begins."""
        if self.run.profile_steps:
            with self.paused_timer():  # which waits for the device, as no other step does
                self.profile.step()
        with self.timer.waiting_for_data():
            yield

    def paused_timer(self) -> AbstractContextManager[None]:
        """A context around what is not training: its time does not count."""
        return self.timer.paused()

    def show_part_progress(self, what: str, index: int, count: int) -> None:
        """Call before each part of a step or an evaluation (training.evaluate.Between)."""
        self.progress.show_part_progress(self.last_reported_step + 1, what, index, count)

    def step(
        self,
        step: int,
        result: StepResult,
        batches: list[Batch],
        evaluation: Evaluation | None = None,
        unscored: bool = False,
    ) -> None:
        """Call after every step, with the evaluation if one was due; unscored: if a signal cut it short."""
        self.done = step
        self.last_reported_step = step
        self.unscored = unscored
        targets = torch.cat([batch.targets for batch in batches])
        row = MetricRow(step=step, tokens=step * self.run.batch_tokens, **self.run.learning_rates(step - 1))
        row["data_seconds"] = self.timer.step(self.run.batch_tokens)
        if evaluation is not None:
            row |= evaluation.columns()
        if unscored:
            row[UNSCORED] = True
        self.pending.append(PendingRow(row, self._numbers(result, targets), tuple(result.reported)))
        if self._flush_is_due(result, evaluation is not None):
            self.flush()
        if evaluation is not None:
            self.print_line(summary.score_line(f"step {step}", evaluation.reported))

    def _numbers(self, result: StepResult, targets: Tensor) -> Tensor:
        """(numbers,) of a step, on the device."""
        counted = targets >= 0
        of_text = torch.stack([(self.byte_lengths[targets] * counted).sum(), counted.sum()])
        numbers = (result.loss, result.grad_norm, *self.world.total(of_text), result.skipped)
        return torch.stack([number.to(result.loss) for number in (*numbers, *result.reported.values())])

    def _flush_is_due(self, result: StepResult, evaluated: bool) -> bool:
        free_to_read = self.device.type == "cpu"
        due = evaluated or self.done == self.run.steps or self.timer.elapsed >= FLUSH_SECONDS
        return due or bool(free_to_read and result.skipped)

    def flush_to_disk(self) -> None:
        """Call before a checkpoint: all steps so far are on the disk when it returns."""
        self.flush()
        self.metrics.sync()
        self.sink.sync()

    def flush(self) -> None:
        """Write the rows of the steps since the last time. Waits for the device."""
        if not self.pending:
            return
        pending = self.pending
        self.pending = []
        numbers = torch.stack([each.numbers for each in pending]).tolist()
        shared = self._speed_columns(self.timer.close_interval())
        for (row, _, names), of_step in zip(pending, numbers, strict=True):
            row |= self._step_columns(shared, *of_step[:OF_EVERY_STEP])
            reported = zip(names, of_step[OF_EVERY_STEP:], strict=True)
            row |= {name: int(number) if name in COUNTS else number for name, number in reported}
            self.metrics.write(row)
            self.sink.write(row)
            self._report_trouble(row)
        last, mean = pending[-1].row, self.timer.tokens_per_second
        left = (self.run.steps - last["step"]) * self.run.batch_tokens
        # The speed that is shown is the one that the remaining time is told from.
        self.progress.step(last | self._speed_columns(mean), left / mean)

    def _speed_columns(self, tokens_per_second: float) -> MetricRow:
        return MetricRow(
            tokens_per_second=tokens_per_second,
            flops_per_second=tokens_per_second * self.flops_per_token,
            mfu=self._mfu(tokens_per_second),
            memory_bytes=peak_memory(self.device),
        )

    def _step_columns(
        self, shared: MetricRow, loss: float, grad_norm: float, text_bytes: float, counted: float, skipped: float
    ) -> MetricRow:
        bpb = loss * counted / (math.log(2) * max(1.0, text_bytes))
        columns = MetricRow(train_loss=loss, train_bpb=bpb, grad_norm=grad_norm, **shared)
        if not counted:
            columns["uncounted"] = True
        elif skipped:
            columns["skipped"] = True
        return columns

    def _mfu(self, tokens_per_second: float) -> float | None:
        return self.peak_flops and tokens_per_second * self.flops_per_token / (self.peak_flops * self.world.size)

    def _report_trouble(self, row: MetricRow) -> None:
        spike = self.guard.see(row)
        if row.get("uncounted"):
            if self.guard.uncounted == 1:
                self.print_line(summary.uncounted_line(row))
        elif row.get("skipped") and self.guard.in_a_row <= self.run.max_skipped_updates:
            self.print_line(
                summary.skipped_line(row, self.guard.skipped, self.run.precision, self._documents(row["step"]))
            )
        elif spike:
            self.print_line(summary.spike_line(row, self.guard.usual_loss, self._documents(row["step"])))

    def _documents(self, step: int) -> str:
        """Names of the documents that a step trained on, or of some of them."""
        run = self.run
        names = documents_of_step(self.corpus, run.model.context_length, run.seed, step - 1, run.sequences)
        more = len(names) - MAX_DOCUMENTS_NAMED
        some = ", ".join(names[:MAX_DOCUMENTS_NAMED]) or "names are lost"
        return f"{some} and {more} more" if more > 0 else some

    def print_line(self, line: str) -> None:
        """Print a line above the live one."""
        self.progress.print_line(line)

    def print_text(self, text: str) -> None:
        """Print a text of several lines above the live one."""
        self.progress.print_text(text)

    def print_last_line(self, line: str) -> None:
        """Print the last line of a run that a signal stopped."""
        self.progress.print_last_line(line)

    def final_lines(self, evaluation: Evaluation) -> list[str]:
        """The lines that end a run: its scores, its speed, and what can be done with it."""
        speed = []
        if self.timer.tokens:
            mean = self.timer.tokens_per_second
            speed = [summary.speed_line(mean, self._mfu(mean), self.timer.data_share)]
        return final_lines(self.run, self.folder, evaluation, self.metrics.before, speed)

    def draw_picture(self) -> None:
        """Draw experts.png, where there are experts, and last of all loss.png. That marks the run as finished: while it
        is missing, a resumed run prints its final lines again."""
        if not self.world.is_first:
            return
        for draw, name in ((plot_experts, "experts.png"), (plot_loss, PICTURE)):
            try:
                draw(self.folder)
            except Exception as error:  # the run matters more than the picture
                log.warning(f"{self.folder}/{name} cannot be drawn: {error}")
