"""Score of a text under a model: loss in nats per token, and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.loss import chunked_losses


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


def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor, **where: Tensor) -> Tensor:
    """Nats of each token, (B, T). where: `positions` and `docs` of packed documents, as the model takes them."""
    return chunked_losses(model(inputs, **where, logits=False).hidden, model.lm_head, targets)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: Tensor,
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor] = token_losses,
) -> Score:
    """Score batches of (inputs, targets), each (B, T) on the CPU; every token has the same weight in any batch size.
    byte_lengths: (V,) bytes of text that each token stands for. losses: the function for nats per token, (B, T)."""
    device = next(model.parameters()).device
    nats = 0.0
    tokens = 0
    text_bytes = 0
    for inputs, targets in batches:
        tokens += targets.numel()
        text_bytes += int(byte_lengths[targets].sum())
        nats += losses(model, inputs.to(device), targets.to(device)).cpu().double().sum().item()
    return Score(nats, tokens, text_bytes)
