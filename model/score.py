"""Score of a text under a model: loss in nats per token, and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.loss import NOT_COUNTED, chunked_losses
from model.placement import Placement, Windows


class Score(NamedTuple):
    """Negative log-likelihood of a text under a model."""

    nats: float
    tokens: int
    text_bytes: int  # bytes of the predicted tokens; a separator counts as a token of no bytes

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte: comparable across tokenizers."""
        return self.nats / (math.log(2) * self.text_bytes)

    def plus(self, other: "Score") -> "Score":
        """Score of both texts together."""
        return Score(*(mine + its for mine, its in zip(self, other, strict=True)))


def token_losses(model: nn.Module, batch: Windows) -> Tensor:
    """Nats of each token, (B, T), 0 where a target is not counted."""
    return chunked_losses(model(batch.inputs, Placement.of_batch(batch)).x, model.lm_head, batch.targets)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[Windows],
    byte_lengths: Tensor,
    losses: Callable[[nn.Module, Windows], Tensor] = token_losses,
) -> Score:
    """Score batches on the CPU; every counted token has the same weight in any batch size. byte_lengths: (V,) bytes of
    text that each token stands for. losses: the function for nats per token, (B, T)."""
    device = next(model.parameters()).device
    nats = 0.0
    tokens = 0
    text_bytes = 0
    for batch in batches:
        counted = batch.targets[batch.targets != NOT_COUNTED]
        tokens += counted.numel()
        text_bytes += int(byte_lengths[counted].sum())
        nats += losses(model, batch.to(device)).cpu().double().sum().item()
    return Score(nats, tokens, text_bytes)
