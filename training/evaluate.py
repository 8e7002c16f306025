"""Evaluation: the validation loss, on the same kind of windows as training."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch
from model.loss import NOT_COUNTED
from model.score import Score, score_batches, token_losses
from runtime.world import ONE, World

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
    world: World = ONE,
) -> Score:
    """The validation loss of batches that are read one at a time. byte_lengths: (V,) bytes of text that each token
    stands for. losses, accuracy: as score_batches takes them. between: may give the evaluation up by an exception.
    world: the processes that score them together, every one as many: one without a batch left scores no target of the
    first."""

    def announced() -> Iterator[Batch]:
        for index in range(world.rank, -(-len(batches) // world.size) * world.size, world.size):
            between("validation batch", min(index, len(batches) - 1), len(batches))
            yield batches[index]() if index < len(batches) else _uncounted(batches[0]())

    own = score_batches(model, announced(), byte_lengths, losses, accuracy)
    if world.size == 1:
        return own
    return functools.reduce(Score.plus, world.gathered(own))


def _uncounted(batch: Batch) -> Batch:
    return batch._replace(targets=torch.full_like(batch.targets, NOT_COUNTED))
