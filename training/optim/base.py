"""Contract of an optimizer: typed settings that build a torch.optim.Optimizer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import Field

from common.settings import FrozenSettings
from model.layout import ParamLayout
from model.transformer import TransformerLM
from runtime.precision import Precision, Shard
from runtime.world import ONE, World
from training.optim.groups import GroupConfig, check_groups, freeze
from training.optim.qk_clip import QKClip


class StateTensor(NamedTuple):
    """A tensor in the optimizer's state of a parameter, as a checkpoint must hold it."""

    shape: torch.Size
    minimum: float = -math.inf  # no number in it is smaller
    dtype: torch.dtype = torch.float32
    counts: bool = False  # it is how many updates there were

    @classmethod
    def count(cls) -> Self:
        return cls(torch.Size(), 0.0, counts=True)

    def in_place_of(self, held: torch.Size, whole: torch.Size) -> Self:
        """That of the whole parameter, where this is of the part `held` of it."""
        return self._replace(shape=whole) if self.shape == held else self

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def shards_of(model: TransformerLM, precision: Precision | None) -> tuple[Mapping[str, Shard], World]:
    """The parameters of a model by their names, as a precision strategy holds them, and the processes that share them;
    of None, whole ones in one process."""
    if precision is None:
        return {name: Shard.whole(parameter) for name, parameter in model.named_parameters()}, ONE
    return precision.shards, precision.world


def scale_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to its base rate times a factor. The base rate of a group is the
    rate it was made with, kept as `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


class OptimConfig(FrozenSettings, ABC):
    own_logit_init: ClassVar[float | None] = None  # of a model that leaves it to the optimizer

    @property
    def acts_on_rows(self) -> bool:
        """Whether a process that has some rows of each matrix can update these, alone or with the others."""
        return True

    lr: float | None = Field(gt=0)  # peak; unset, it derives from d_model
    qk_clip: float | None = Field(gt=0)  # QK-clip: the largest score a head may have and keep its scale
    groups: list[GroupConfig]  # of each parameter, the first that matches

    @property
    def base_lrs(self) -> dict[str, float]:
        """Peak learning rates by their settings, each of which the schedule multiplies. Call it on a derived choice."""
        return {"lr": self.lr}

    @abstractmethod
    def derive(self, d_model: int) -> Self:
        """The same choice with the learning rate filled in."""

    @abstractmethod
    def build(self, model: TransformerLM, precision: Precision | None = None) -> torch.optim.Optimizer:
        """An optimizer over the model's parameters that are not frozen, each group at its peak rate, as a precision
        strategy holds them; None: whole, in one process. It has a method `state_layout(parameter)`, as the one
        below."""

    @abstractmethod
    def state_layout(self, layout: ParamLayout, shape: torch.Size) -> dict[str, StateTensor]:
        """State tensors of a parameter after a step, by name."""

    def check_groups(self, model: TransformerLM) -> None:
        """Raise ValueError where `groups` do not fit the model's parameters."""
        check_groups(self.groups, [name for name, _ in model.named_parameters()], model.frozen_in_warmup())

    def freeze(self, model: TransformerLM) -> None:
        """Freeze the parameters of groups that do not train, and all but the indexers where these are warmed up. Call
        it before anything else learns of the model."""
        freeze(model, self.groups)
        model.freeze_for_warmup()

    def clip(self, model: TransformerLM, precision: Precision | None = None) -> QKClip | None:
        """QK-clip, which acts on the parameters after each update, where it is on. precision: as `build` takes it."""
        return None if self.qk_clip is None else QKClip(model, self.qk_clip, shards_of(model, precision)[0])

    def state_bytes(self, model: TransformerLM, precision: Precision | None = None) -> int:
        """Bytes of the optimizer's state in this process, of the parameters that are not frozen. precision: as `build`
        takes it."""
        shards, _ = shards_of(model, precision)
        named = ((shards[name].local, layout) for name, layout in model.layout().items())
        states = (self.state_layout(layout, p.shape).values() for p, layout in named if p.requires_grad)
        return sum(state.nbytes for of_parameter in states for state in of_parameter)
