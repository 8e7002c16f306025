"""Session: evaluation, checkpoints and stopping on a signal, for the training loop of one process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from common.signals import Stopped, StopRequest
from common.streams import print_stderr
from data.shards.prepare import Prepared
from model.score import Score
from training.attention_stats import attention_stats
from training.evaluate import Evaluation, evaluate
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
    losses: Callable  # cross-entropy of each token, as training.step.losses_of makes it
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
                return self._evaluation(whole=step == self.run.steps)
        except Stopped:
            return None

    def evaluate_before_steps(self, done: int) -> Evaluation | None:
        """The evaluation that is due before the first step of this process, if any: one that a signal cut short, that
        of a run whose steps are all done, or that of the weights that training begins with."""
        due = self.monitor.unscored or done == self.run.steps or (self.run.evaluates_before and not done)
        if not due:
            return None
        evaluation = self.evaluate(done)
        if evaluation is None:
            self.stop_after(done)
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

    def stop_after(self, step: int) -> NoReturn:
        """End the process after a step that is saved, as a signal asked."""
        self._stop(step, within=False)

    def stop_within(self, step: int, evaluation: Evaluation | None) -> NoReturn:
        """End the process in the midst of a step, the one after `step`. evaluation: that after `step`."""
        if step > self.saved_step:
            self.save(step, evaluation)
        self._stop(step, within=True)

    def _stop(self, step: int, within: bool) -> NoReturn:
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
        sys.exit(self.stop.exit_code)

    def _evaluation(self, whole: bool) -> Evaluation:
        run = self.run
        self.state.mixed.copy_master_weights()
        prefix = self._score(slice(0, run.eval_tokens))
        reported = prefix.plus(self._score(slice(run.eval_tokens, None))) if whole else prefix
        return Evaluation(prefix, reported, self._attention_stats() if run.log_attention else {})

    def _score(self, tokens: slice) -> Score:
        return evaluate(
            self.state.mixed.model,
            self.corpus.val,
            self.run.model.context_length,
            self.run.micro_batch_size,
            torch.from_numpy(self.corpus.tokenizer.byte_lengths),
            tokens=tokens,
            losses=self.losses,
            between=self.check_stop,
        )

    def _attention_stats(self) -> dict[str, float]:
        run = self.run
        end_of_text = self.corpus.tokenizer.end_of_text if run.data.document_mask else None
        return attention_stats(
            self.state.model, self.corpus.val, run.model.context_length, run.micro_batch_size, end_of_text
        )


@contextmanager
def second_signal_ends(folder: Path) -> Iterator[None]:
    """A context around a StopRequest's loop: its second signal ends the process at once, with one line."""
    try:
        yield
    except KeyboardInterrupt:
        print_stderr(f"stopped at once; {how_to_continue(folder)}")
        sys.exit(130)
