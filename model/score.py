"""How well a model predicts text: nats per token and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.loss import chunked_losses


class Score(NamedTuple):
    """Of some text under a model."""

    nats: float
    tokens: int
    text_bytes: int  # of the tokens predicted; a separator's loss counts, but it has no bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nats / (math.log(2) * self.text_bytes)

    def plus(self, other: "Score") -> "Score":
        """Of both texts."""
        return Score(*(mine + its for mine, its in zip(self, other, strict=True)))


def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor, **where: Tensor) -> Tensor:
    """Nats of each token, (B, T). where: positions and documents of packed windows, as the model takes them."""
    return chunked_losses(model(inputs, **where, logits=False).hidden, model.lm_head, targets)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: Tensor,
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor] = token_losses,
) -> Score:
    """The score of inputs and targets, each (B, T) on the CPU; every token weighs the same, whatever the batch size.
    byte_lengths: (V,) bytes of text that each token stands for. losses: nats of each token, (B, T)."""
    device = next(model.parameters()).device
    nats, tokens, text_bytes = 0.0, 0, 0
    for inputs, targets in batches:
        tokens += targets.numel()
        text_bytes += int(byte_lengths[targets].sum())
        nats += losses(model, inputs.to(device), targets.to(device)).cpu().double().sum().item()
    return Score(nats, tokens, text_bytes)
