"""One optimizer step, and one evaluation."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import stack, windows
from data.shards import TokenStream
from training.loss import token_losses
from training.precision import Working


class StepResult(NamedTuple):
    loss: Tensor  # mean nats per token of the step, a scalar on the device: reading it waits for the device
    grad_norm: Tensor  # before clipping


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token, a scalar."""
    return token_losses(model(inputs).logits, targets).mean()


def train_step(
    working: Working,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float,
    clip_norm: float,
    loss: Callable = mean_loss,
) -> StepResult:
    """One update from equally large micro-batches. clip_norm 0 does not clip."""
    working.refresh()
    batches = list(batches)
    total = torch.zeros((), device=parameters[0].device)
    for inputs, targets in batches:
        share = loss(working.model, inputs, targets) / len(batches)
        share.backward()
        working.collect_gradients()
        total += share.detach()
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm)


class Score(NamedTuple):
    loss: float  # nats per token
    bpb: float  # all nats / (ln 2 · bytes of the tokens predicted); a separator's loss counts, but it has no bytes
    tokens: int


def each_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token, (B, T)."""
    return token_losses(model(inputs).logits, targets)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    stream: TokenStream,
    length: int,
    batch_size: int,
    byte_lengths: Tensor,
    most_tokens: int | None = None,
    losses: Callable = each_loss,
) -> Score:
    """Scores the stream in windows that do not overlap, or as many of the first as most_tokens hold. Every token
    weighs the same, whatever the batch size."""
    device = next(model.parameters()).device
    count = windows(stream, length)
    if most_tokens is not None:
        count = min(count, most_tokens // length)
    nats, text_bytes = 0.0, 0
    for first in range(0, count, batch_size):
        inputs, targets = stack(stream, length, list(range(first, min(first + batch_size, count))))
        text_bytes += int(byte_lengths[targets].sum())
        nats += losses(model, inputs.to(device), targets.to(device)).cpu().double().sum().item()
    tokens = count * length
    return Score(nats / tokens, nats / (math.log(2) * text_bytes), tokens)
