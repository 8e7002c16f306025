"""Evaluation: the validation loss, on the same kind of windows as training."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from data.batches import document_positions, evaluation_batches
from data.shards.token_files import TokenStream
from model.score import Score, score_batches, token_losses

Between = Callable[[str, int, int], None]  # called before each part of a long computation: what, which, of how many


class Evaluation(NamedTuple):
    """The validation scores after a step."""

    prefix: Score  # on the first eval_tokens of the validation set, by which checkpoints are compared
    reported: Score  # after the last step, on the whole validation set; else the same
    attention: Mapping[str, float] = {}  # attention statistics, as metrics.jsonl names them, where they are asked for

    def columns(self) -> dict[str, float]:
        """The evaluation's columns of metrics.jsonl."""
        score = self.reported
        return {"val_loss": score.loss, "val_bpb": score.bpb, "val_tokens": score.tokens, **self.attention}


def go_on(what: str, index: int, count: int) -> None:
    """A `Between` that does nothing."""


def each_loss(model: nn.Module, inputs: Tensor, targets: Tensor, end_of_text: int | None = None) -> Tensor:
    """Cross-entropy of each token in nats, (B, T)."""
    return token_losses(model, inputs, targets, **packed_positions(inputs, end_of_text))


def packed_positions(inputs: Tensor, end_of_text: int | None) -> dict[str, Tensor]:
    """Positions and document ids of packed documents, each (B, T), as keyword arguments of the model; {} without a
    document mask."""
    if end_of_text is None:
        return {}
    positions, docs = document_positions(inputs, end_of_text)
    return {"positions": positions, "docs": docs}


def evaluate(
    model: nn.Module,
    stream: TokenStream,
    length: int,
    batch_size: int,
    byte_lengths: Tensor,
    *,
    tokens: slice = slice(None),
    losses: Callable = each_loss,
    between: Between = go_on,
) -> Score:
    """The validation loss of a stream, in windows of `length` that do not overlap. byte_lengths: (V,) bytes of text
    that each token stands for. tokens: only the windows that lie between two of the stream's tokens. between: may give
    the evaluation up by an exception."""
    batches = evaluation_batches(stream, length, batch_size, tokens)

    def announced() -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches):
            between("validation batch", index, len(batches))
            yield batch()

    return score_batches(model, announced(), byte_lengths, losses)
