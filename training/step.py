"""One optimizer step: gradient accumulation over micro-batches, clipping, update."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch
from model.loss import chunked_mean
from model.placement import Placement
from model.score import token_losses
from runtime.precision import MixedPrecision
from training.compile import maybe_compiled
from training.evaluate import Between, go_on
from training.optim.base import scale_rates
from training.optim.qk_clip import Clipped, QKClip

MAX_LOGIT = frozenset({"max_logit"})


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the device."""

    loss: Tensor  # mean nats per token
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # bool: one of the two is not finite, and nothing was updated
    clipped: Clipped | None = None  # where QK-clip is on


class Losses(NamedTuple):
    """Loss functions of (model, batch)."""

    mean_loss: Callable  # of training: the mean nats per token, and auxiliary outputs
    token_losses: Callable  # of evaluation: the nats of each token, (B, T)


def mean_loss(
    model: nn.Module,
    batch: Batch,
    collect: frozenset[str] = frozenset(),
    min_tile: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy in nats per token, a scalar, and the auxiliary outputs named in `collect`.
    min_tile: see chunked_mean."""
    out = model(batch.inputs, Placement.of_batch(batch), training=True, collect=collect)
    return chunked_mean(out.x, model.lm_head, batch.targets, min_tile), out.aux


def train_step(
    mixed: MixedPrecision,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    factor: float,
    clip_norm: float,
    *,
    seeds: tuple[int, int] = (0, 0),
    loss: Callable = mean_loss,
    clip: QKClip | None = None,
    between: Between = go_on,
) -> StepResult:
    """One update from equally large micro-batches. A loss or gradient that is not finite skips it.

    factor: of each parameter group's base rate. seeds: the run's, and the step. clip_norm 0 does not clip. loss:
    mean_loss; with `clip`, which acts on the updated weights, one that collects MAX_LOGIT. between: may give the step
    up by an exception, which leaves weights and optimizer as they were.
    """
    try:
        mean, max_logits = accumulate_gradients(mixed, batches, seeds, loss, between)
    except Exception:
        optimizer.zero_grad(set_to_none=True)
        raise
    grad_norm = nn.utils.clip_grad_norm_(mixed.parameters, clip_norm or math.inf)
    skipped = ~(mean.isfinite() & grad_norm.isfinite())
    scale_rates(optimizer, factor)
    _step_unless(skipped, optimizer)
    clipped = None if clip is None else clip(max_logits, skipped)
    if mixed.loss_scale is not None:
        mixed.loss_scale.update(skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean, grad_norm, skipped, clipped)


def accumulate_gradients(
    mixed: MixedPrecision,
    batches: Iterable[Batch],
    seeds: tuple[int, int],
    loss: Callable = mean_loss,
    between: Between = go_on,
) -> tuple[Tensor, Tensor | None]:
    """Gradient accumulation: adds the gradients of the mean loss over all micro-batches to the float32 parameters ->
    that loss, a scalar, and the largest attention score of each head, (layers, heads) float32, where the loss function
    collects MAX_LOGIT.

    What is random in a micro-step draws from (seed, step, micro-step): a resumed run needs no hidden state.
    """
    mixed.copy_master_weights()
    batches = list(batches)
    total = torch.zeros((), device=mixed.parameters[0].device)
    max_logits = None
    for micro_step, batch in enumerate(batches):
        between("micro-batch", micro_step, len(batches))
        _seed_micro_step(seeds, micro_step)
        mean, aux = loss(mixed.model, batch)
        share = mean / len(batches)
        mixed.backward(share)
        total += share.detach()
        if aux:
            scores = torch.stack(list(aux.values()))
            max_logits = scores if max_logits is None else torch.maximum(max_logits, scores)
    mixed.unscale()
    return total, max_logits


def _seed_micro_step(seeds: tuple[int, int], micro_step: int) -> None:
    digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update the parameters, if `skipped` (scalar bool) is false. Where the optimizer cannot read it on the device, the
    device is waited for."""
    if reads_found_inf(optimizer):
        optimizer.grad_scale = None
        optimizer.found_inf = skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not skipped:
        optimizer.step()


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer skips itself where its attribute found_inf is 1. Fused optimizers of PyTorch and
    Muon do; they say so by this attribute, which torch.amp.GradScaler looks for, and PyTorch has no public name for."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def losses_of(
    clip: QKClip | None = None,
    compilation: tuple[bool, bool] = (False, False),
) -> Losses:
    """The loss functions of a run. clip: the training loss collects MAX_LOGIT for it. compilation: whether they are
    compiled, and autotuned."""
    mean = mean_loss
    if clip is not None:
        mean = functools.partial(mean, collect=MAX_LOGIT)
    return Losses(maybe_compiled(mean, *compilation), maybe_compiled(token_losses, *compilation))
