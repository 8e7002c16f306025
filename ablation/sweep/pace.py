"""What a sweep will take: a timed step of each variant, and from it the seconds of a run."""

from pathlib import Path
from typing import NamedTuple

from data.batches import check_split_lengths
from data.shards.prepare import Prepared, prepare
from training.minutes import seconds_per_step
from training.run.config import Run

STARTUP = 5.0  # seconds of a process before its first step and after its last one
FORWARD = 1 / 3  # of the time of training a token, that of scoring one


class Pace(NamedTuple):
    """How fast a variant trains here."""

    step: float  # seconds
    val_tokens: int  # of the whole validation set

    def seconds(self, run: Run, done: int = 0) -> float:
        """Of the whole run, its evaluations and the start of its process included, without the steps done."""
        left = run.steps - done
        evaluations = left // run.eval_every if run.eval_every else 0
        scored = min(run.eval_tokens, self.val_tokens) * evaluations + self.val_tokens
        return STARTUP + self.step * (left + FORWARD * scored / run.batch_tokens)


def prepared(run: Run) -> Prepared:
    """The corpus, prepared once for all cells that share it. Raises UserError."""
    corpus = prepare(run.data, run.tokenizer, Path(run.cache_dir))
    check_split_lengths(corpus, run.model.context_length)
    return corpus


def pace_of(run: Run, corpus: Prepared) -> Pace:
    return Pace(seconds_per_step(run, corpus), len(corpus.val))
