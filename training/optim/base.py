"""Contract of an optimizer: typed settings that build a torch.optim.Optimizer."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import nn

from common.settings import FrozenSettings
from model.transformer import TransformerLM
from training.optim.qk_clip import QKClip


class StateTensor(NamedTuple):
    """A float32 tensor in the optimizer's state of a parameter, as a checkpoint must hold it."""

    shape: torch.Size
    minimum: float = -math.inf  # no number in it is smaller

    @classmethod
    def count(cls) -> Self:
        return cls(torch.Size(), 0.0)


def scale_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to its base rate times a factor. The base rate of a group is the
    rate it was made with, kept as `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


class OptimConfig(FrozenSettings, ABC):
    lr: float | None = Field(gt=0)  # peak; unset, it derives from d_model
    qk_clip: float | None = Field(gt=0)  # QK-clip: the largest score a head may have and keep its scale

    @property
    def base_lrs(self) -> dict[str, float]:
        """Peak learning rates by their settings, each of which the schedule multiplies. Call it on a derived choice."""
        return {"lr": self.lr}

    @abstractmethod
    def derive(self, d_model: int) -> Self:
        """The same choice with the learning rate filled in."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over all of the model's parameters, each group at its peak rate."""

    def clip(self, model: TransformerLM) -> QKClip | None:
        """QK-clip, which acts on the model after each update, where it is on."""
        return None if self.qk_clip is None else QKClip(model, self.qk_clip)

    def state_bytes(self, model: nn.Module) -> int:
        """Bytes of the optimizer's state: two float32 moments of each parameter, unless a subclass overrides it."""
        return sum(2 * 4 * p.numel() for p in model.parameters())
