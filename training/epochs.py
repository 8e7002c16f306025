"""How often a run reads its training text, and what to do where that is too often."""

from collections.abc import Iterator

from data.batches import count_windows
from data.shards.prepare import Prepared
from training.run.config import Run

MOST = 4  # epochs that are worth nearly as much as fresh text (Muennighoff et al. 2023, arXiv:2305.16264)


def tokens_of_epoch(run: Run, corpus: Prepared) -> int:
    """Tokens that are trained on when each window of the training text is read once."""
    return count_windows(corpus.train, run.model.context_length) * run.model.context_length


def epochs(run: Run, corpus: Prepared) -> str:
    """Of the whole run, for people."""
    count = run.steps * run.batch_tokens / tokens_of_epoch(run, corpus)
    return f"{count:.3g}" if count < 1000 else f"{count:,.0f}"


def repetitions(run: Run, corpus: Prepared, done: int = 0) -> Iterator[str]:
    """A line for a batch larger than the training text, and one for a run that reads it more than MOST times. done:
    steps that are behind it, below which there is no advice to go."""
    epoch = tokens_of_epoch(run, corpus)
    if run.batch_tokens > epoch:
        yield (
            f"batch_tokens={run.batch_tokens} is more than the {epoch} tokens of the training text, so a step reads "
            f"some of it twice: give batch_tokens={epoch} or less, or more text"
        )
    if run.steps * run.batch_tokens > MOST * epoch:
        steps = MOST * epoch // run.batch_tokens
        fewer = f"steps={steps}, which makes {MOST} epochs, or " if steps > done else ""
        yield (
            f"the training text is read {epochs(run, corpus)} times: beyond {MOST} epochs a model learns it by heart, "
            f"and other text gets worse: give {fewer}more text"
        )
