"""Score of a text under a model: loss in nats per token, and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.loss import NOT_COUNTED, chunked_hits, chunked_losses
from model.placement import Placement, Windows


class Score(NamedTuple):
    """Negative log-likelihood of a text under a model."""

    nats: float
    tokens: int
    text_bytes: int  # bytes of the predicted tokens; a separator counts as a token of no bytes
    right: int | None = None  # tokens that have the largest logit; None: not asked for

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte: comparable across tokenizers."""
        return self.nats / (math.log(2) * self.text_bytes)

    @property
    def accuracy(self) -> float | None:
        """Share of tokens that have the largest logit."""
        return None if self.right is None else self.right / self.tokens

    def plus(self, other: "Score") -> "Score":
        """Score of both texts together."""
        *sums, right = zip(self, other, strict=True)
        return Score(*map(sum, sums), right=None if None in right else sum(right))


def token_losses(model: nn.Module, batch: Windows) -> Tensor:
    """Nats of each token, (B, T), 0 where a target is not counted."""
    return chunked_losses(model(batch.inputs, Placement.of_batch(batch)).x, model.lm_head, batch.targets)


def token_losses_and_hits(model: nn.Module, batch: Windows) -> tuple[Tensor, Tensor]:
    """Nats of each token, as `token_losses`, and whether it has the largest logit, (B, T) bool, false where a target is
    not counted."""
    hidden = model(batch.inputs, Placement.of_batch(batch)).x
    return chunked_losses(hidden, model.lm_head, batch.targets), chunked_hits(hidden, model.lm_head, batch.targets)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[Windows],
    byte_lengths: Tensor,
    losses: Callable[[nn.Module, Windows], Tensor | tuple[Tensor, Tensor]] = token_losses,
    accuracy: bool = False,
) -> Score:
    """Score batches on the CPU; every counted token has the same weight in any batch size. byte_lengths: (V,) bytes of
    text that each token stands for. losses: the function for nats per token, (B, T); with accuracy, for these and
    the hits, as token_losses_and_hits."""
    device = next(model.parameters()).device
    nats = 0.0
    tokens = 0
    text_bytes = 0
    right = 0 if accuracy else None
    for batch in batches:
        counted = batch.targets[batch.targets != NOT_COUNTED]
        tokens += counted.numel()
        text_bytes += int(byte_lengths[counted].sum())
        found = losses(model, batch.to(device))
        if accuracy:
            found, hits = found
            right += int(hits.sum())
        nats += found.cpu().double().sum().item()
    return Score(nats, tokens, text_bytes, right)
