"""Cross-entropy loss of the next token, in float32, computed in chunks of logits.

With a large vocabulary the logits are the largest tensor there is: 8192 tokens with GPT-2's vocabulary take 1.6 GB in
float32, as do their probabilities and their gradient. Here they exist a chunk of tokens at a time, in the dtype of the
weights, and in float32 a few rows at a time. The gradient of a chunk needs only that chunk, so it is computed along
with the loss (Hsu et al. 2024, arXiv:2410.10989, section 3.2) and multiplied in the backward pass by the incoming
gradient.

F.linear_cross_entropy of PyTorch 2.13 would do so too, but knows no softcap, leaves compiled code, adds up a bfloat16
loss in bfloat16, and on a CPU takes two to five times as long (benchmarks/README.md).

A target of -1 is not counted: it has neither loss nor gradient.

Letters: N tokens, n of a chunk, d width, V vocabulary, V' its matrix's rows, padding counted.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.transformer import LMHead, softcapped
from model.upcast import upcast, upcast_dtype

CHUNK = {"cpu": 2**26}  # bytes of logits that exist at one time
LARGE_CHUNK = 2**29  # bytes of logits that exist at one time where each chunk costs a launch, or a compiler's time
MAX_TOKENS = 4096  # in a chunk
MAX_FLOAT16_TOKENS = 1024  # in a chunk in float16: sums over more tokens could overflow
TILE = {"cpu": 2**18}  # logits in float32 at one time: as many as a cache holds
LARGE_TILE = 2**23  # logits in float32 at one time on a GPU: enough to keep it busy

NOT_COUNTED = -1  # a target that has no loss


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy by its definition, all at once: logits (B, T, V), targets (B, T) -> nats of each token, (B, T)
    float32, 0 where a target is not counted."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=NOT_COUNTED
    )
    return losses.view_as(targets)


def chunked_losses(hidden: Tensor, lm_head: LMHead, targets: Tensor) -> Tensor:
    """Cross-entropy in chunks, as token_losses of the logits, without a gradient: hidden (B, T, d), targets (B, T) ->
    nats of each token, (B, T) float32."""
    with torch.no_grad():
        return _losses(hidden.flatten(0, 1), lm_head, targets.flatten()).view_as(targets)


def chunked_hits(hidden: Tensor, lm_head: LMHead, targets: Tensor) -> Tensor:
    """Whether each target has the largest logit, in chunks: hidden (B, T, d), targets (B, T) -> (B, T) bool, false for
    one that is not counted."""
    x = hidden.flatten(0, 1)
    rows = CHUNK["cpu"] // (len(lm_head.weight) * lm_head.weight.element_size())
    with torch.no_grad():
        largest = [lm_head.logits(x[chunk]).argmax(-1) for chunk in _cut(len(x), rows)]
    return torch.cat(largest).view_as(targets) == targets


def chunked_mean(hidden: Tensor, lm_head: LMHead, targets: Tensor, min_tile: int = 0) -> Tensor:
    """Mean cross-entropy of the counted targets in chunks, a scalar, with its gradient; 0 where none is counted.
    min_tile: number of logits to take to float32 at one time, if the device's own tile is smaller."""
    if not torch.is_grad_enabled():
        return chunked_losses(hidden, lm_head, targets).sum() / _count(targets)
    return _Mean.apply(hidden.flatten(0, 1), lm_head.weight, targets.flatten(), lm_head, min_tile)


def _count(targets: Tensor) -> Tensor:
    """The number of counted targets, at least 1, float32."""
    return (targets != NOT_COUNTED).sum().clamp(min=1).float()


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, lm_head: LMHead, min_tile: int) -> Tensor:
        """x (N, d), weight (V', d), targets (N) -> scalar. weight: that of the lm_head, which autograd knows by it."""
        # none of what is frozen: that of a vocabulary is as large as its matrix, and takes a third of the products
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=upcast_dtype(weight)) if ctx.needs_input_grad[1] else None
        losses = _losses(x, lm_head._replace(weight=weight), targets, d_x, d_weight, min_tile)
        count = _count(targets)
        ctx.save_for_backward(d_x, d_weight, count)
        ctx.dtype = weight.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradient is that of the sum, which float16 can represent whatever the number of tokens."""
        d_x, d_weight, count = ctx.saved_tensors
        share = d_mean / count
        if d_x is not None:
            d_x = (upcast(d_x) * share).to(d_x.dtype)
        if d_weight is not None:
            # In place, as another of its size would be the most that a step holds. Autograd knows of it: a second
            # backward pass raises.
            d_weight = d_weight.mul_(share).to(ctx.dtype)
        return d_x, d_weight, None, None, None


def _losses(
    x: Tensor,
    lm_head: LMHead,
    targets: Tensor,
    d_x: Tensor | None = None,
    d_weight: Tensor | None = None,
    min_tile: int = 0,
) -> Tensor:
    """Losses in chunks: x (N, d), targets (N) -> nats of each token, (N) float32. d_x, d_weight: buffers for the
    gradients of their sum, with respect to x and to the weight (zeros, float32); None where it is not needed.

    A target that is not counted has the hidden state 0 here, whose product with any gradient is 0: masking costs N · d
    numbers, not N · V.
    """
    weight, vocab_size, softcap = lm_head
    differentiate = d_x is not None or d_weight is not None
    losses = x.new_empty(len(x), dtype=upcast_dtype(x))
    masked = targets == NOT_COUNTED
    targets = targets.masked_fill(masked, 0)
    compiling = torch.compiler.is_compiling()
    chunk_bytes = LARGE_CHUNK if compiling else CHUNK.get(x.device.type, LARGE_CHUNK)
    tokens = MAX_FLOAT16_TOKENS if weight.dtype == torch.float16 else MAX_TOKENS
    tokens = min(tokens, chunk_bytes // (len(weight) * weight.element_size()))
    for chunk in _cut(len(x), tokens):
        hidden = x[chunk].masked_fill(masked[chunk, None], 0)
        logits = hidden @ weight.mT  # (n, V')
        # a compiler makes its own tiles, and would write ours out one after the other
        tile = len(logits) if compiling else max(min_tile, TILE.get(x.device.type, LARGE_TILE)) // len(weight)
        for rows in _cut(len(logits), tile):
            part = logits[rows, :vocab_size]
            losses[chunk][rows] = _of_tile(part, targets[chunk][rows], softcap, differentiate)
        if differentiate:
            logits[:, vocab_size:] = 0
        if d_x is not None:
            d_x[chunk] = logits @ weight
        if d_weight is not None:
            _add_product(d_weight, logits, hidden)
    if d_x is not None:
        d_x.masked_fill_(masked[:, None], 0)
    return losses.masked_fill_(masked, 0)


def _add_product(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """Add d_logitsᵀ hidden, (n, V') and (n, d), to d_weight (V', d) in float32."""
    if hidden.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.mT, hidden)
    else:
        d_weight += d_logits.mT @ hidden


def _of_tile(logits: Tensor, targets: Tensor, softcap: float | None, differentiate: bool) -> Tensor:
    """Losses of a tile: logits (t, V), targets (t) -> nats (t) float32. With `differentiate`, replaces the logits by
    their gradient:

    loss = log Σ e^z - z[target]      dz = softmax(z) - onehot(target)      dlogits = dz · (1 - (z / cap)²)

    with z = cap · tanh(logits / cap), or the logits themselves. The largest
    probability gives the sum that softmax divides by: log Σ e^z = max z - log max softmax(z).
    """
    z = softcapped(upcast(logits).contiguous(), softcap)  # where rows are padded, softmax would copy them unseen
    p = z.softmax(-1)
    at_target = targets[:, None]
    losses = z.amax(-1) - p.amax(-1).log() - z.gather(1, at_target)[:, 0]
    if differentiate:
        p.scatter_add_(1, at_target, torch.full_like(p[:, :1], -1))
        logits.copy_(p if softcap is None else p * (1 - (z / softcap) ** 2))
    return losses


def _cut(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
