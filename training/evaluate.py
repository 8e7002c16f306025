"""Evaluation: the validation loss, on the same kind of windows as training."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch
from model.loss import NOT_COUNTED
from model.score import Score, score_batches, token_losses
from runtime.world import World

Between = Callable[[str, int, int], None]  # called before each part of a long computation: what, which, of how many


class Evaluation(NamedTuple):
    """The validation scores after a step."""

    prefix: Score  # on the first eval_tokens of the validation set, by which checkpoints are compared
    reported: Score  # after the last step, on the whole validation set; else the same
    attention: Mapping[str, float] = {}  # attention statistics, as metrics.jsonl names them, where they are asked for
    experts: Mapping[str, float] = {}  # loads of experts, where there are any

    def columns(self) -> dict[str, float]:
        """The evaluation's columns of metrics.jsonl."""
        score = self.reported
        accuracy = {} if score.accuracy is None else {"val_accuracy": score.accuracy}
        scores = {"val_loss": score.loss, "val_bpb": score.bpb, "val_tokens": score.tokens}
        return scores | accuracy | dict(self.attention) | dict(self.experts)


def go_on(what: str, index: int, count: int) -> None:
    """A `Between` that does nothing."""


def evaluate(
    model: nn.Module,
    batches: list[Callable[[], Batch]],
    byte_lengths: Tensor,
    *,
    losses: Callable = token_losses,
    accuracy: bool = False,
    between: Between = go_on,
) -> Score:
    """The validation loss of batches that are read one at a time. byte_lengths: (V,) bytes of text that each token
    stands for. losses, accuracy: as score_batches takes them. between: may give the evaluation up by an exception."""

    def announced() -> Iterator[Batch]:
        for index, read in enumerate(batches):
            between("validation batch", index, len(batches))
            yield read()

    return score_batches(model, announced(), byte_lengths, losses, accuracy)


def share(batches: list[Callable[[], Batch]], world: World) -> list[Callable[[], Batch]]:
    """The batches that this process scores, as many as every other: where none is left for it, the first one, of which
    no target counts."""
    short = -len(batches) % world.size
    return (batches + [lambda: _uncounted(batches[0]())] * short)[world.rank :: world.size]


def _uncounted(batch: Batch) -> Batch:
    return batch._replace(targets=torch.full_like(batch.targets, NOT_COUNTED))
