"""Session: evaluation, checkpoints and stopping on a signal, for the training loop of one process."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from common.signals import Stopped, StopRequest
from data.batches import Batch, TrainingBatches, evaluation_batches
from data.prefetch import Prefetch
from data.shards.prepare import Prepared
from model.score import Score
from runtime.world import ONE, World
from training.attention_stats import attention_stats
from training.balance import LoadBalance
from training.evaluate import Between, Evaluation, evaluate, share
from training.expert_loads import expert_loads
from training.monitor import summary
from training.monitor.monitor import Monitor
from training.run import checkpoint
from training.run.config import Run
from training.run.replay import save_failed_step
from training.run.start import how_to_continue
from training.state import TrainState
from training.step import StepResult


class Session:
    """Reads batches, evaluates, saves and stops, for the training loop around its steps; a context manager, which ends
    the reading. `evaluation` is that after the last step done, None where none was due."""

    def __init__(
        self, run: Run, folder: Path, corpus: Prepared, state: TrainState, monitor: Monitor, stop: StopRequest
    ):
        self.run = run
        self.folder = folder
        self.corpus = corpus
        self.state = state
        self.monitor = monitor
        self.stop = stop
        self.saved_step = state.step  # of the newest checkpoint
        self.evaluation: Evaluation | None = None
        self.world = state.world
        self.prefetch = Prefetch(training_batches(run, corpus, self.world), state.device, run.steps)

    def __enter__(self) -> Self:
        self.prefetch.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        self.prefetch.__exit__(*raised)

    def next_batches(self) -> list[Batch]:
        """Wait for the micro-batches of the next step."""
        self.world.reached(self.state.step + 1)
        with self.monitor.timing_data():
            return self.prefetch.of_step(self.state.step)

    @contextmanager
    def saving_where_stopped(self) -> Iterator[None]:
        """A context around a step: where a signal gives the step up, what was done before it is saved."""
        try:
            yield
        except Stopped:
            if self.state.step > self.saved_step:
                self.save()
            self.report_stop(within=True)
            raise

    def end_step(self, result: StepResult, batches: list[Batch]) -> None:
        """Evaluate, record and save, as is due after a step. Raises Stopped where a signal came, and UserError where
        training has diverged."""
        run = self.run
        step = self.state.step
        due = step == run.steps or (run.eval_every > 0 and step % run.eval_every == 0)
        self.evaluation = self.evaluate() if due else None
        self.monitor.step(step, result, batches, self.evaluation, unscored=due and self.evaluation is None)
        stopping, diverged, in_a_row = self._agreed_end()
        if stopping or diverged or step == run.steps or step % run.save_every == 0:
            self.save()
        if diverged:
            if self.world.size > 1:  # of whose step these are a share
                batches = training_batches(run, self.corpus).of_step(step - 1, self.state.device)
            raise save_failed_step(self.folder, run, self.corpus, self.state, in_a_row, batches)
        if stopping:
            self.report_stop()
            raise Stopped

    def _agreed_end(self) -> tuple[bool, bool, int]:
        """Whether a signal came, and whether training has diverged, to any process; and after how many skipped
        updates."""
        guard = self.monitor.guard
        signal, diverged, in_a_row = self.world.agreed(self.stop.signal or 0, int(guard.diverged), guard.in_a_row)
        self.stop.receive(signal)
        return signal > 0, diverged > 0, in_a_row

    def preview_is_due(self) -> bool:
        """Whether a text is sampled after the step."""
        step = self.state.step
        return self.run.sample_every > 0 and step % self.run.sample_every == 0 and step < self.run.steps

    def check_stop(self, what: str, index: int, count: int) -> None:
        """Call between two parts of a step or an evaluation. Raises Stopped where a signal came to any process."""
        [signal] = self.world.agreed(self.stop.signal or 0)
        self.stop.receive(signal)
        if signal:
            raise Stopped
        self.monitor.show_part_progress(what, index, count)

    def evaluate(self) -> Evaluation | None:
        """The evaluation after a step: on the first eval_tokens of the validation set, and after the last step on all
        of it. None where a signal came: a resumed run makes up for it."""
        try:
            with self.monitor.paused_timer():
                return evaluation_of(
                    self.run,
                    self.corpus,
                    self.state,
                    whole=self.state.step == self.run.steps,
                    on_part=self.check_stop,
                )
        except Stopped:
            return None

    def evaluate_before_steps(self) -> None:
        """Make the evaluation that is due before the first step of this process, if any: one that a signal cut short,
        that of a run whose steps are all done, or that of the weights that training begins with. Raises Stopped where a
        signal came."""
        done = self.state.step
        due = self.monitor.unscored or done == self.run.steps or (self.run.evaluates_before and not done)
        if not due:
            return
        self.evaluation = self.evaluate()
        if self.evaluation is None:
            self.report_stop()
            raise Stopped
        if self.monitor.unscored:
            # First the checkpoint: a kill between the two leaves the row's mark, which says that it is due.
            if self.world.is_first:
                checkpoint.score(self.folder, done, self.evaluation.prefix.loss)
            self.monitor.record_late_evaluation(self.evaluation)
        elif not done:
            self.monitor.record_initial_evaluation(self.evaluation)

    def save(self) -> None:
        """Write the rows of metrics, then the checkpoint."""
        self.monitor.flush_to_disk()
        # A resumed run that had diverged, and does still, has nothing new; but float16's loss scale has halved.
        if not self.monitor.guard.diverged_before or self.run.precision == "fp16":
            with self.monitor.paused_timer():
                val_loss = None if self.evaluation is None else self.evaluation.prefix.loss
                checkpoint.save(self.folder, self.run, self.corpus, self.state, val_loss)
        self.saved_step = self.state.step

    def report_stop(self, within: bool = False) -> None:
        """Print the last line of a process that a signal stops after a step that is saved; within: in the midst of the
        next one."""
        step = self.state.step
        self.monitor.print_last_line(
            summary.stopped_line(
                self.stop.signal.name,
                step,
                within=within,
                unscored=self.monitor.unscored,
                complete=step == self.run.steps,
                go_on=how_to_continue(self.folder),
            )
        )


def training_batches(run: Run, corpus: Prepared, world: World = ONE) -> TrainingBatches:
    """The batches that the steps of a run train on, of each process its share."""
    start = run.document_start(corpus.tokenizer)
    plan = run.model.context_length, run.seed, run.sequences, run.micro_batch_size
    return TrainingBatches(corpus.train, *plan, start, run.counted_targets, world.rank, world.size)


def evaluation_of(run: Run, corpus: Prepared, state: TrainState, whole: bool, on_part: Between) -> Evaluation:
    """Score the first eval_tokens of the validation set; whole: and the rest of it. on_part: called before each part,
    may give the evaluation up by an exception."""
    state.precision.copy_master_weights()
    length = run.model.context_length
    document_start = run.document_start(corpus.tokenizer)
    counted = run.counted_targets
    accuracy = counted is not None
    byte_lengths = torch.from_numpy(corpus.tokenizer.byte_lengths)
    losses = state.losses.token_losses

    def score(tokens: slice) -> Score:
        batches = evaluation_batches(corpus.val, length, run.micro_batch_size, tokens, document_start, counted)
        model = state.precision.model
        own = share(batches, state.world)
        found = evaluate(model, own, byte_lengths, losses=losses, accuracy=accuracy, between=on_part)
        return functools.reduce(Score.plus, state.world.gathered(found))

    prefix = score(slice(0, run.eval_tokens))
    reported = prefix.plus(score(slice(run.eval_tokens, None))) if whole else prefix
    attention = {}
    if run.log_attention:
        attention = attention_stats(state.model, corpus.val, length, run.micro_batch_size, document_start)
    experts = {}
    if LoadBalance.of(state.model):
        experts = expert_loads(state.model, corpus.val, length, run.micro_batch_size, document_start)
    return Evaluation(prefix, reported, attention, experts)
