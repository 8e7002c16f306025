"""One optimizer step, and one evaluation."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import document_places, stack, windows
from data.corpus import Corpus
from data.shards import TokenStream
from runtime.precision import Working
from training.compilation import maybe_compiled
from training.loss import chunked_losses, chunked_mean
from training.qk_clip import Clipped, QKClip

MAX_LOGIT = frozenset({"max_logit"})


Between = Callable[[str, int, int], None]  # called before each part of a long computation: what, which, of how many


def go_on(what: str, index: int, count: int) -> None:
    """Between two parts, for who has nothing to do there."""


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the device."""

    loss: Tensor  # mean nats per token
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # bool: one of the two is not finite, and nothing was updated
    clipped: Clipped | None = None  # where QK-clip is on


def mean_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, end_of_text: int | None = None, recompute: bool = False
) -> Tensor:
    """Mean nats per token, a scalar. end_of_text: the token that begins a document, where documents are kept apart.
    recompute: activations, in the backward pass."""
    out = model(inputs, **places(inputs, end_of_text), logits=False, training=True, recompute=recompute)
    return chunked_mean(out.hidden, model.readout, targets)


def mean_loss_and_scores(
    model: nn.Module, inputs: Tensor, targets: Tensor, end_of_text: int | None = None, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """mean_loss, and the largest score of each head, (layers, heads) float32."""
    how = {"logits": False, "training": True, "recompute": recompute, "want": MAX_LOGIT}
    out = model(inputs, **places(inputs, end_of_text), **how)
    return chunked_mean(out.hidden, model.readout, targets), torch.stack(list(out.extras.values()))


def train_step(
    working: Working,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float,
    clip_norm: float,
    seeds: tuple[int, int] = (0, 0),
    loss: Callable = mean_loss,
    clip: QKClip | None = None,
    between: Between = go_on,
) -> StepResult:
    """One update from equally large micro-batches. seeds: the run's, and the step. clip_norm 0 does not clip. loss:
    mean_loss; with `clip`, which acts on the updated weights, mean_loss_and_scores. between: may give the step up by an
    exception, which leaves weights and optimizer as they were."""
    try:
        mean, max_logits = accumulate(working, batches, seeds, loss, between)
    except Exception:
        optimizer.zero_grad(set_to_none=True)
        raise
    grad_norm = nn.utils.clip_grad_norm_(working.parameters, clip_norm or math.inf)
    skipped = ~(mean.isfinite() & grad_norm.isfinite())
    for group in optimizer.param_groups:
        group["lr"] = lr
    _step_unless(skipped, optimizer)
    clipped = None if clip is None else clip(max_logits, skipped)
    if working.loss_scale is not None:
        working.loss_scale.update(skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean, grad_norm, skipped, clipped)


def accumulate(
    working: Working,
    batches: Iterable[tuple[Tensor, Tensor]],
    seeds: tuple[int, int],
    loss: Callable = mean_loss,
    between: Between = go_on,
) -> tuple[Tensor, Tensor | None]:
    """Adds the gradients of the mean loss to the float32 parameters -> the mean loss, a scalar, and the largest score
    of each head where the loss says them.

    What is random in a micro-step draws from (seed, step, micro-step): a resumed run needs no hidden state.
    """
    working.refresh()
    batches = list(batches)
    total, largest = torch.zeros((), device=working.parameters[0].device), None
    for micro_step, (inputs, targets) in enumerate(batches):
        between("micro-batch", micro_step, len(batches))
        digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        said = loss(working.model, inputs, targets)
        mean, scores = said if isinstance(said, tuple) else (said, None)
        share = mean / len(batches)
        working.backward(share)
        total += share.detach()
        if scores is not None:
            largest = scores if largest is None else torch.maximum(largest, scores)
    working.unscale()
    return total, largest


def _step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Fused optimizers take the word of a tensor, as they do from PyTorch's own gradient scaler; for others the device
    is waited for."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skipped:
        optimizer.step()


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


def each_loss(model: nn.Module, inputs: Tensor, targets: Tensor, end_of_text: int | None = None) -> Tensor:
    """Nats of each token, (B, T)."""
    return chunked_losses(model(inputs, **places(inputs, end_of_text), logits=False).hidden, model.readout, targets)


def losses_of(
    corpus: Corpus,
    end_of_text: int,
    clip: QKClip | None = None,
    recompute: bool = False,
    compilation: tuple[bool, bool] = (False, False),
) -> tuple[Callable, Callable]:
    """What to train by and each_loss, as the corpus wants its documents read. compilation: whether they are compiled,
    and autotuned."""
    mean, each = mean_loss if clip is None else mean_loss_and_scores, each_loss
    if recompute:
        mean = functools.partial(mean, recompute=True)
    if corpus.document_mask:
        mean, each = (functools.partial(function, end_of_text=end_of_text) for function in (mean, each))
    return maybe_compiled(mean, *compilation), maybe_compiled(each, *compilation)


def places(inputs: Tensor, end_of_text: int | None) -> dict[str, Tensor]:
    """Positions and documents of packed windows (B, T), as a model takes them; nothing, where documents see each
    other."""
    if end_of_text is None:
        return {}
    positions, docs = document_places(inputs, end_of_text)
    return {"positions": positions, "docs": docs}


@torch.no_grad()
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
    """Scores the stream, or the windows that lie between two of its tokens, in windows that do not overlap. Every token
    weighs the same, whatever the batch size. between: may give it up by an exception."""
    device = next(model.parameters()).device
    start, stop, _ = tokens.indices(windows(stream, length) * length)
    chosen = range(start // length, stop // length)
    nats, text_bytes = 0.0, 0
    for first in range(0, len(chosen), batch_size):
        between("validation batch", first // batch_size, -(-len(chosen) // batch_size))
        inputs, targets = stack(stream, length, list(chosen[first : first + batch_size]))
        text_bytes += int(byte_lengths[targets].sum())
        nats += losses(model, inputs.to(device), targets.to(device)).cpu().double().sum().item()
    return Score(nats, len(chosen) * length, text_bytes)
