"""One optimizer step."""

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
) -> Tensor:
    """Mean nats per token, a scalar. end_of_text: the token that begins a document, where documents are kept apart.
    activation_checkpointing: activations are recomputed in the backward pass."""
    out = model(
        inputs,
        **places(inputs, end_of_text),
        logits=False,
        training=True,
        activation_checkpointing=activation_checkpointing,
    )
    return chunked_mean(out.hidden, model.lm_head, targets)


def mean_loss_and_scores(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    end_of_text: int | None = None,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Tensor]:
    """mean_loss, and the largest score of each head, (layers, heads) float32."""
    how = {
        "logits": False,
        "training": True,
        "activation_checkpointing": activation_checkpointing,
        "collect": MAX_LOGIT,
    }
    out = model(inputs, **places(inputs, end_of_text), **how)
    return chunked_mean(out.hidden, model.lm_head, targets), torch.stack(list(out.aux.values()))


def train_step(
    mixed: MixedPrecision,
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
        mean, max_logits = accumulate(mixed, batches, seeds, loss, between)
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


def accumulate(
    mixed: MixedPrecision,
    batches: Iterable[tuple[Tensor, Tensor]],
    seeds: tuple[int, int],
    loss: Callable = mean_loss,
    between: Between = go_on,
) -> tuple[Tensor, Tensor | None]:
    """Adds the gradients of the mean loss to the float32 parameters -> the mean loss, a scalar, and the largest score
    of each head where the loss says them.

    What is random in a micro-step draws from (seed, step, micro-step): a resumed run needs no hidden state.
    """
    mixed.copy_master_weights()
    batches = list(batches)
    total, largest = torch.zeros((), device=mixed.parameters[0].device), None
    for micro_step, (inputs, targets) in enumerate(batches):
        between("micro-batch", micro_step, len(batches))
        digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        said = loss(mixed.model, inputs, targets)
        mean, scores = said if isinstance(said, tuple) else (said, None)
        share = mean / len(batches)
        mixed.backward(share)
        total += share.detach()
        if scores is not None:
            largest = scores if largest is None else torch.maximum(largest, scores)
    mixed.unscale()
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


def losses_of(
    corpus: Corpus,
    end_of_text: int,
    clip: QKClip | None = None,
    activation_checkpointing: bool = False,
    compilation: tuple[bool, bool] = (False, False),
) -> tuple[Callable, Callable]:
    """What to train by and each_loss, as the corpus wants its documents read. compilation: whether they are compiled,
    and autotuned."""
    mean, each = mean_loss if clip is None else mean_loss_and_scores, each_loss
    if activation_checkpointing:
        mean = functools.partial(mean, activation_checkpointing=True)
    if corpus.document_mask:
        mean, each = (functools.partial(function, end_of_text=end_of_text) for function in (mean, each))
    return maybe_compiled(mean, *compilation), maybe_compiled(each, *compilation)
