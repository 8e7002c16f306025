"""One optimizer step: gradient accumulation over micro-batches, clipping, update."""

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from data.batches import Batch
from runtime.world import World
from training.evaluate import Between, go_on
from training.losses import CROSS_ENTROPY, own_name
from training.optim.base import scale_rates
from training.state import AfterStep, TrainState


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the device."""

    loss: Tensor  # mean nats per counted token
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # bool: one of the two is not finite, and nothing was updated
    reported: Mapping[str, Tensor] = MappingProxyType({})  # auxiliary losses, their layers' mean; what hooks report


def train_step(state: TrainState, batches: Iterable[Batch], factor: float, between: Between = go_on) -> StepResult:
    """One update from micro-batches. A loss or gradient that is not finite skips it, and so does a batch of which no
    target is counted, as where all of it is prompts.

    factor: of each parameter group's base rate. between: may give the step up by an exception, which leaves weights and
    optimizer as they were; so does the UserError where no layer reports what an after-step hook goes by.
    """
    optimizer, batches = state.optimizer, list(batches)
    hooks = state.after_step if batches else ()  # without any, as where only the update is timed, nothing is reported
    try:
        mean, aux = accumulate_gradients(state, batches, between)
        _check_reported(hooks, aux)
    except Exception:
        state.precision.drop_gradients()
        raise
    grad_norm = state.precision.clip(state.clip_norm or math.inf)
    skipped = ~(mean.isfinite() & grad_norm.isfinite())
    scale_rates(optimizer, factor)
    _step_unless(skipped, optimizer)
    reported = _means(aux, state.model.auxiliary_losses)
    for hook in hooks:
        reported |= _call(hook, aux, skipped)
    if state.loss_scale is not None:
        counted = state.world.total(sum((batch.counted for batch in batches), mean.new_zeros(())))
        state.loss_scale.update(skipped & (counted > 0))  # a step of prompts alone says nothing of the scale
    state.precision.drop_gradients()
    state.step += 1
    return StepResult(mean, grad_norm, skipped, reported)


def accumulate_gradients(
    state: TrainState, batches: Sequence[Batch], between: Between = go_on
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient accumulation: adds the gradients of the mean loss over the counted targets of all micro-batches, other
    processes' too, to the float32 parameters, and those of auxiliary losses -> that loss, a scalar without these, NaN
    where none is counted; and the auxiliary outputs that the loss function collects, joined over the micro-batches: of
    losses, the mean.

    Each of these means is over what it counts in all micro-batches: of multi-token prediction, which counts fewer
    targets, over its own (_mtp_shares).

    What is random in a micro-step draws from (seed, step, micro-step), counted over the processes by rank: a resumed
    run needs no hidden state.
    """
    precision, world = state.precision, state.world
    precision.copy_master_weights()
    counts = [batch.counted for batch in batches]
    counted = world.total(sum(counts, torch.zeros((), dtype=torch.int64, device=state.device)))  # of no batch too
    shares = _mtp_shares(batches, counts, counted, world) if state.model.mtp is not None else [()] * len(batches)
    first = world.rank * len(batches)
    total = torch.zeros((), device=state.device)
    joined = {}
    for micro_step, batch in enumerate(batches):
        between("micro-batch", micro_step, len(batches))
        _seed_micro_step((state.seed, state.step), first + micro_step, state.device)
        objective, aux = state.losses.mean_loss(precision.model, batch, *shares[micro_step])
        parts = counted / counts[micro_step]  # of equal counts exactly their number: / N, not / n · n / N
        precision.backward(objective / parts)
        total += aux.pop(CROSS_ENTROPY, objective.detach()) / parts
        aux |= {name: aux[name].detach() / parts for name in aux.keys() & state.model.auxiliary_losses.keys()}
        joined = _joined(joined, aux, state.after_step)
    precision.finish_gradients()
    return world.total(total), {name: _across(world, name, value, state.after_step) for name, value in joined.items()}


def _mtp_shares(
    batches: Sequence[Batch], counts: Sequence[Tensor], counted: Tensor, world: World
) -> list[tuple[Tensor]]:
    """What turns the share n / N of each micro-batch in the targets of all into m / M, that in the targets of
    multi-token prediction: a factor m N / (M n) of its loss, as a further argument of the loss function. Exactly 1
    where the two are the same; 0 where nothing is counted."""
    ahead = [batch.ahead().counted for batch in batches]
    all_ahead = world.total(sum(ahead))
    pairs = zip(ahead, counts, strict=True)
    return [(of_it * counted / (all_ahead.clamp(min=1) * count.clamp(min=1)),) for of_it, count in pairs]


def _across(world: World, name: str, value: Tensor, hooks: Iterable[AfterStep]) -> Tensor:
    """Join an auxiliary output of the processes, by its hook's rule; of losses, the sum of what each has a share of."""
    rule = next((hook.reduce for hook in hooks if hook.collects == own_name(name)), torch.add)
    if rule in (torch.add, torch.maximum):
        return world.total(value) if rule is torch.add else world.largest(value)
    return functools.reduce(rule, world.gathered(value))


def _joined(before: dict[str, Tensor], aux: dict[str, Tensor], hooks: Iterable[AfterStep]) -> dict[str, Tensor]:
    """Join the auxiliary outputs of a micro-batch with those of the ones before it, each by its hook's rule."""
    if not before:
        return aux
    reduce = {hook.collects: hook.reduce for hook in hooks}
    return {name: reduce.get(own_name(name), torch.add)(before[name], value) for name, value in aux.items()}


def _means(aux: Mapping[str, Tensor], losses: Iterable[str]) -> dict[str, Tensor]:
    """The mean of each auxiliary loss over the layers that have it, by its own name."""
    found: dict[str, list[Tensor]] = {}
    for name in losses if aux else ():  # no micro-batch reports none
        found.setdefault(own_name(name), []).append(aux[name])
    return {name: torch.stack(values).mean() for name, values in found.items()}


def _check_reported(hooks: Iterable[AfterStep], aux: dict[str, Tensor]) -> None:
    """Raise UserError where no layer reported what a hook goes by."""
    reported = {own_name(name) for name in aux}
    for hook in hooks:
        if hook.collects not in reported:
            name = type(hook).__name__
            raise UserError(
                f"{name} acts after each step by the auxiliary output {hook.collects}, which no layer returns: return "
                f"it from the layer's forward where it is collected, or train without {name} (after_step_hooks in "
                "training/state.py; QKClip: optim.qk_clip unset)"
            )


def _call(hook: AfterStep, aux: dict[str, Tensor], skipped: Tensor) -> dict[str, Tensor]:
    return hook(torch.stack([value for name, value in aux.items() if own_name(name) == hook.collects]), skipped)


def _seed_micro_step(seeds: tuple[int, int], micro_step: int, device: torch.device) -> None:
    digest = hashlib.sha256(f"{seeds}/{micro_step}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    if device.type == "cpu":  # torch.manual_seed would note for every kind of GPU who asked, which takes a while
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
