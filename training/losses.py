"""Loss functions of training and evaluation, compiled or not."""

import functools
from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor, nn

from data.batches import Batch
from model.loss import chunked_mean
from model.mtp import MTP_LOSS
from model.placement import Placement
from model.score import token_losses, token_losses_and_hits
from training.compile import maybe_compiled

CROSS_ENTROPY = "cross_entropy"


def mean_loss(
    model: nn.Module,
    batch: Batch,
    mtp_share: Tensor | float = 1.0,
    collect: frozenset[str] = frozenset(),
    min_tile: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy in nats per counted token, a scalar, and the auxiliary outputs named in `collect`.
    mtp_share: what the loss of multi-token prediction is multiplied by. min_tile: see chunked_mean.

    Where the model has auxiliary losses, these are added to the scalar, each times its weight; the outputs then hold
    them too, and the cross-entropy alone, as CROSS_ENTROPY."""
    weights = model.auxiliary_losses
    at, names = Placement.of_batch(batch), collect | {own_name(name) for name in weights}
    out = model(batch.inputs, at, training=True, collect=names)
    mean = chunked_mean(out.x, model.lm_head, batch.targets, min_tile)
    if not weights:
        return mean, out.aux
    aux = out.aux
    if MTP_LOSS in weights:
        after, targets = batch.ahead()
        second = model.look_ahead(out.stream, after, at, training=True, collect=names)
        loss = mtp_share * chunked_mean(second.x, model.lm_head, targets, min_tile)
        aux = aux | second.aux | {MTP_LOSS: loss}
    objective = mean + sum(weight * aux[name] for name, weight in weights.items())
    return objective, aux | {CROSS_ENTROPY: mean.detach()}


def own_name(output: str) -> str:
    """The name of an auxiliary output within its layer."""
    return output.rpartition(".")[2]


class Losses(NamedTuple):
    """Loss functions of (model, batch)."""

    mean_loss: Callable = mean_loss  # of training: the mean nats per token, and auxiliary outputs
    token_losses: Callable = token_losses  # of evaluation: the nats of each token, (B, T); with accuracy, and the hits

    @classmethod
    def of(cls, collect: frozenset[str], compilation: tuple[bool, bool], accuracy: bool = False) -> Self:
        """The loss functions of a run. collect: auxiliary outputs that the training loss collects. compilation: whether
        they are compiled, and autotuned. accuracy: whether evaluation measures it."""
        of_tokens = token_losses_and_hits if accuracy else token_losses
        mean = functools.partial(mean_loss, collect=collect) if collect else mean_loss
        return cls(maybe_compiled(mean, *compilation), maybe_compiled(of_tokens, *compilation))


EAGER = Losses()
