"""Epochs: how often a run reads its training text, and warnings where that is too often."""

from collections.abc import Iterator

from data.batches import count_windows
from data.shards.prepare import Prepared
from training.run.config import Run

MAX_EPOCHS = 4  # that are worth nearly as much as fresh text (Muennighoff et al. 2023, arXiv:2305.16264)


def tokens_of_epoch(run: Run, corpus: Prepared) -> int:
    """Training tokens of one epoch, in which each window of the training text is read once."""
    return count_windows(corpus.train, run.model.context_length) * run.model.context_length


def epochs(run: Run, corpus: Prepared) -> str:
    """The number of epochs of the whole run, as text."""
    count = run.steps * run.batch_tokens / tokens_of_epoch(run, corpus)
    return f"{count:.3g}" if count < 1000 else f"{count:,.0f}"


def repetition_warnings(run: Run, corpus: Prepared, done: int = 0) -> Iterator[str]:
    """Warning lines for a batch larger than the training text, and for a run that reads it more than MAX_EPOCHS times.
    done: steps already trained; fewer than these are not advised."""
    epoch = tokens_of_epoch(run, corpus)
    if run.batch_tokens > epoch:
        yield (
            f"warning      batch_tokens={run.batch_tokens} is more than the {epoch} tokens of the training text, so a "
            f"step reads some of it twice: give batch_tokens={epoch} or less, or more text"
        )
    if run.steps * run.batch_tokens > MAX_EPOCHS * epoch:
        steps = MAX_EPOCHS * epoch // run.batch_tokens
        fewer = f"steps={steps}, which makes {MAX_EPOCHS} epochs, or " if steps > done else ""
        yield (
            f"warning      the training text is read {epochs(run, corpus)} times: beyond {MAX_EPOCHS} epochs a model "
            f"learns it by heart, and other text gets worse: give {fewer}more text"
        )
