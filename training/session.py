"""Session: evaluation, checkpoints and stopping on a signal, for the training loop of one process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.signals import Stopped, StopRequest
from data.batches import evaluation_batches
from data.shards.prepare import Prepared
from model.score import Score
from training.attention_stats import attention_stats
from training.evaluate import Between, Evaluation, evaluate
from training.monitor import summary
from training.monitor.monitor import Monitor
from training.run import checkpoint
from training.run.config import Run
from training.run.start import how_to_continue
from training.state import TrainState


@dataclass
class Session:
    """Evaluates, saves and stops, for the training loop between its steps."""

    run: Run
    folder: Path
    corpus: Prepared
    state: TrainState
    token_losses: Callable  # nats of each token, as training.step.losses_of makes it
    monitor: Monitor
    stop: StopRequest
    saved_step: int  # the step of the newest checkpoint

    def check_stop(self, what: str, index: int, count: int) -> None:
        """Call between two parts of a step or an evaluation. Raises Stopped where a signal came."""
        self.stop.raise_if_stopped()
        self.monitor.show_part_progress(what, index, count)

    def evaluate(self, step: int) -> Evaluation | None:
        """The evaluation after a step: on the first eval_tokens of the validation set, and after the last step on all
        of it. None where a signal came: a resumed run makes up for it."""
        try:
            with self.monitor.paused_timer():
                return evaluation_of(
                    self.run,
                    self.corpus,
                    self.state,
                    self.token_losses,
                    whole=step == self.run.steps,
                    on_part=self.check_stop,
                )
        except Stopped:
            return None

    def evaluate_before_steps(self, done: int) -> Evaluation | None:
        """The evaluation that is due before the first step of this process, if any: one that a signal cut short, that
        of a run whose steps are all done, or that of the weights that training begins with. Raises Stopped where a
        signal came."""
        due = self.monitor.unscored or done == self.run.steps or (self.run.evaluates_before and not done)
        if not due:
            return None
        evaluation = self.evaluate(done)
        if evaluation is None:
            self.report_stop(done)
            raise Stopped
        if self.monitor.unscored:
            # First the checkpoint: a kill between the two leaves the row's mark, which says that it is due.
            checkpoint.score(self.folder, done, evaluation.prefix.loss)
            self.monitor.record_late_evaluation(evaluation)
        elif not done:
            self.monitor.record_initial_evaluation(evaluation)
        return evaluation

    def save_is_due(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint."""
        last = step == self.run.steps
        return last or step % self.run.save_every == 0 or self.monitor.guard.diverged

    def save(self, step: int, evaluation: Evaluation | None) -> None:
        """Write the rows of metrics, then the checkpoint of a step. evaluation: that after the same step."""
        self.monitor.flush_to_disk()
        # A resumed run that had diverged, and does still, has nothing new; but float16's loss scale has halved.
        if not self.monitor.guard.diverged_before or self.run.precision == "fp16":
            with self.monitor.paused_timer():
                val_loss = None if evaluation is None else evaluation.prefix.loss
                checkpoint.save(self.folder, self.run, self.corpus, self.state, step, val_loss)
        self.saved_step = step

    def save_if_new(self, step: int, evaluation: Evaluation | None) -> None:
        """Save a step that has no checkpoint yet."""
        if step > self.saved_step:
            self.save(step, evaluation)

    def report_stop(self, step: int, within: bool = False) -> None:
        """Print the last line of a process that a signal stops after a step that is saved; within: in the midst of the
        next one."""
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


def evaluation_of(
    run: Run, corpus: Prepared, state: TrainState, token_losses: Callable, whole: bool, on_part: Between
) -> Evaluation:
    """Score the first eval_tokens of the validation set; whole: and the rest of it. on_part: called before each part,
    may give the evaluation up by an exception."""
    state.mixed.copy_master_weights()
    length = run.model.context_length
    document_start = run.document_start(corpus.tokenizer)
    byte_lengths = torch.from_numpy(corpus.tokenizer.byte_lengths)

    def score(tokens: slice) -> Score:
        batches = evaluation_batches(corpus.val, length, run.micro_batch_size, tokens, document_start)
        return evaluate(state.mixed.model, batches, byte_lengths, losses=token_losses, between=on_part)

    prefix = score(slice(0, run.eval_tokens))
    reported = prefix.plus(score(slice(run.eval_tokens, None))) if whole else prefix
    attention = {}
    if run.log_attention:
        attention = attention_stats(state.model, corpus.val, length, run.micro_batch_size, document_start)
    return Evaluation(prefix, reported, attention)
