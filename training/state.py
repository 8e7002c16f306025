"""TrainState: a model in training, and all that its step needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from model.initialise import initial_weight, initialised, without_matrices
from model.transformer import TransformerLM
from runtime.precision import LossScale, Precision, Weights
from runtime.world import ONE, World
from training.balance import LoadBalance
from training.losses import EAGER, Losses
from training.optim.qk_clip import QKClip
from training.parallel.plan import applied
from training.run.config import Run


class AfterStep(Protocol):
    """A hook that moves weights or buffers of the model after an update, by what its layers reported during the step.
    QK-clip is one."""

    collects: str  # the auxiliary output that it goes by
    reduce: Callable[[Tensor, Tensor], Tensor]  # joins those of two micro-batches

    def __call__(self, collected: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """collected: the auxiliary output of all layers that have it, stacked. skipped: scalar bool; a step that was
        skipped moves nothing. Returns scalars for metrics.jsonl, by the names of its columns."""


@dataclass
class TrainState:
    """A model in training. Weights, buffers, optimizer state, loss scale and step are what a checkpoint holds of it."""

    model: TransformerLM  # the float32 master weights
    precision: Precision  # what forward and backward run on
    optimizer: torch.optim.Optimizer
    losses: Losses = EAGER
    clip_norm: float = 0.0  # 0 does not clip
    seed: int = 0
    after_step: Sequence[AfterStep] = ()
    step: int = 0  # steps done

    @classmethod
    def create(cls, run: Run, vocab_size: int, device: torch.device, world: World = ONE) -> Self:
        """The state that a run begins with: freshly initialised weights. run: with a chosen precision (not auto).
        world: the processes that train it."""
        if not run.parallel.shards:
            return cls.of(run, initialised(run.model, vocab_size, run.seed).to(device), world)
        model = without_matrices(run.model, vocab_size)
        return cls.of(run, model, world, initial_weights(model, run.seed))

    @classmethod
    def of(cls, run: Run, model: TransformerLM, world: World = ONE, weights: Weights | None = None) -> Self:
        """The state around a model that is on its device with its weights, initialised or loaded; or around one that is
        to be sharded, on the meta device, and whose weights are handed over in pieces. The rest is applied from
        outside, in the order of training.parallel.plan."""
        precision = applied(run, model, world, weights)
        after_step = after_step_hooks(run, model, precision)
        collect = frozenset(hook.collects for hook in after_step)
        losses = Losses.of(collect, run.compilation, accuracy=run.counted_targets is not None)
        optimizer = run.optim.build(model, precision)
        return cls(model, precision, optimizer, losses, run.clip_norm, run.seed, after_step)

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of float16; None in other precisions."""
        return self.precision.loss_scale

    @property
    def world(self) -> World:
        """The processes that train the model together."""
        return self.precision.world

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def initial_weights(model: TransformerLM, seed: int) -> Weights:
    """What a model without matrices (model.initialise) begins with: drawn whole, a parameter at a time."""
    layouts, buffers = model.layout(), dict(model.named_buffers())

    def rows_of(name: str, rows: slice) -> Tensor:
        return buffers[name] if name in buffers else initial_weight(model, layouts, name, seed)[rows].clone()

    return rows_of


def after_step_hooks(run: Run, model: TransformerLM, precision: Precision) -> list[AfterStep]:
    """The hooks of a run, in the order in which they are called."""
    clip: QKClip | None = run.optim.clip(model, precision)
    return [*([] if clip is None else [clip]), *LoadBalance.of(model)]
