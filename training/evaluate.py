"""Evaluation: the score of validation text, read as training reads its own."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from data.batches import document_positions, evaluation_batches
from data.shards.token_files import TokenStream
from model.score import Score, score_batches, token_losses

Between = Callable[[str, int, int], None]  # called before each part of a long computation: what, which, of how many


def go_on(what: str, index: int, count: int) -> None:
    """Between two parts, for who has nothing to do there."""


def each_loss(model: nn.Module, inputs: Tensor, targets: Tensor, end_of_text: int | None = None) -> Tensor:
    """Nats of each token, (B, T)."""
    return token_losses(model, inputs, targets, **places(inputs, end_of_text))


def places(inputs: Tensor, end_of_text: int | None) -> dict[str, Tensor]:
    """Positions and documents of packed windows (B, T), as a model takes them; nothing, where documents see each
    other."""
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
    tokens: slice = slice(None),
    losses: Callable = each_loss,
    between: Between = go_on,
) -> Score:
    """Scores the stream, or the windows that lie between two of its tokens, in windows that do not overlap. between:
    may give it up by an exception."""
    batches = evaluation_batches(stream, length, batch_size, tokens)

    def announced() -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches):
            between("validation batch", index, len(batches))
            yield batch()

    return score_batches(model, announced(), byte_lengths, losses)
