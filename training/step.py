"""One optimizer step: gradient accumulation over micro-batches, clipping, update."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.sources.corpus import Corpus
from model.loss import chunked_mean
from runtime.precision import MixedPrecision
from training.compile import maybe_compiled
from training.evaluate import Between, each_loss, go_on, places
from training.optim.qk_clip import Clipped, QKClip

MAX_LOGIT = frozenset({"max_logit"})


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the device."""

    loss: Tensor  # mean nats per token
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # bool: one of the two is not finite, and nothing was updated
    clipped: Clipped | None = None  # where QK-clip is on


def mean_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    end_of_text: int | None = None,
    activation_checkpointing: bool = False,
    min_tile: int = 0,
) -> Tensor:
    """Mean cross-entropy in nats per token, a scalar. end_of_text: the token that begins a document, with a document
    mask. activation_checkpointing: activations are recomputed in the backward pass. min_tile: see chunked_mean."""
    out = model(
        inputs,
        **places(inputs, end_of_text),
        logits=False,
        training=True,
        activation_checkpointing=activation_checkpointing,
    )
    return chunked_mean(out.hidden, model.lm_head, targets, min_tile)


def mean_loss_and_scores(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    end_of_text: int | None = None,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Tensor]:
    """mean_loss, and the largest attention score of each head, (layers, heads) float32."""
    out = model(
        inputs,
        **places(inputs, end_of_text),
        logits=False,
        training=True,
        activation_checkpointing=activation_checkpointing,
        collect=MAX_LOGIT,
    )
    return chunked_mean(out.hidden, model.lm_head, targets), torch.stack(list(out.aux.values()))


def train_step(
    mixed: MixedPrecision,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float,
    clip_norm: float,
    *,
    seeds: tuple[int, int] = (0, 0),
    loss: Callable = mean_loss,
    clip: QKClip | None = None,
    between: Between = go_on,
) -> StepResult:
    """One update from equally large micro-batches. A loss or gradient that is not finite skips it.

    seeds: the run's, and the step. clip_norm 0 does not clip. loss: mean_loss; with `clip`, which acts on the updated
    weights, mean_loss_and_scores. between: may give the step up by an exception, which leaves weights and optimizer as
    they were.
    """
    try:
        mean, max_logits = accumulate_gradients(mixed, batches, seeds, loss, between)
    except Exception:
        optimizer.zero_grad(set_to_none=True)
        raise
    grad_norm = nn.utils.clip_grad_norm_(mixed.parameters, clip_norm or math.inf)
    skipped = ~(mean.isfinite() & grad_norm.isfinite())
    for group in optimizer.param_groups:
        group["lr"] = lr
    _step_unless(skipped, optimizer)
    clipped = None if clip is None else clip(max_logits, skipped)
    if mixed.loss_scale is not None:
        mixed.loss_scale.update(skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean, grad_norm, skipped, clipped)


def accumulate_gradients(
    mixed: MixedPrecision,
    batches: Iterable[tuple[Tensor, Tensor]],
    seeds: tuple[int, int],
    loss: Callable = mean_loss,
    between: Between = go_on,
) -> tuple[Tensor, Tensor | None]:
    """Gradient accumulation: adds the gradients of the mean loss over all micro-batches to the float32 parameters ->
    that loss, a scalar, and the largest attention score of each head where the loss function returns them.

    What is random in a micro-step draws from (seed, step, micro-step): a resumed run needs no hidden state.
    """
    mixed.copy_master_weights()
    batches = list(batches)
    total = torch.zeros((), device=mixed.parameters[0].device)
    max_logits = None
    for micro_step, (inputs, targets) in enumerate(batches):
        between("micro-batch", micro_step, len(batches))
        _seed_micro_step(seeds, micro_step)
        found = loss(mixed.model, inputs, targets)
        mean, scores = found if isinstance(found, tuple) else (found, None)
        share = mean / len(batches)
        mixed.backward(share)
        total += share.detach()
        if scores is not None:
            max_logits = scores if max_logits is None else torch.maximum(max_logits, scores)
    mixed.unscale()
    return total, max_logits


def _seed_micro_step(seeds: tuple[int, int], micro_step: int) -> None:
    digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update the parameters, if `skipped` (scalar bool) is false. Fused optimizers read it on the device, as they do
    with PyTorch's own gradient scaler; for others the device is waited for."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None
        optimizer.found_inf = skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skipped:
        optimizer.step()


def losses_of(
    corpus: Corpus,
    end_of_text: int,
    clip: QKClip | None = None,
    activation_checkpointing: bool = False,
    compilation: tuple[bool, bool] = (False, False),
) -> tuple[Callable, Callable]:
    """The loss functions of training (mean_loss, or with `clip` mean_loss_and_scores) and of evaluation (each_loss),
    with the corpus's document mask. compilation: whether they are compiled, and autotuned."""
    mean = mean_loss if clip is None else mean_loss_and_scores
    each = each_loss
    if activation_checkpointing:
        mean = functools.partial(mean, activation_checkpointing=True)
    if corpus.document_mask:
        mean = functools.partial(mean, end_of_text=end_of_text)
        each = functools.partial(each, end_of_text=end_of_text)
    return maybe_compiled(mean, *compilation), maybe_compiled(each, *compilation)
