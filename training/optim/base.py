"""What an optimizer is: typed settings that build a torch.optim.Optimizer."""

import inspect
import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import nn

from common.settings import FrozenSettings
from model.transformer import TransformerLM
from training.optim.qk_clip import QKClip


class Kept(NamedTuple):
    """A tensor of float32 that an optimizer keeps of a parameter between steps."""

    shape: torch.Size
    least: float = -math.inf  # what none of its numbers is below

    @classmethod
    def count(cls) -> Self:
        return cls(torch.Size(), 0.0)


class Uncompiled:
    """Methods of torch.optim.Optimizer without the marks that keep torch.compile out of them. Nothing here compiles an
    optimizer, and each mark imports the compiler, half of all the time that a run takes to its first step. Where a
    release of PyTorch marks none, they are the methods themselves."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class OptimConfig(FrozenSettings, ABC):
    lr: float | None = Field(gt=0)  # peak; unset, it derives from d_model
    qk_clip: float | None = Field(gt=0)  # the largest score a head may have and keep its scale

    @property
    def base_lrs(self) -> dict[str, float]:
        """The learning rates by their settings, each of which the schedule multiplies; of a derived choice."""
        return {"lr": self.lr}

    @abstractmethod
    def derive(self, d_model: int) -> Self:
        """The same choice with the learning rate filled in."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over all of the model's parameters."""

    def clip(self, model: TransformerLM) -> QKClip | None:
        """What acts on the model after each update, if anything does."""
        return None if self.qk_clip is None else QKClip(model, self.qk_clip)

    def state_bytes(self, model: nn.Module) -> int:
        """What the optimizer keeps between steps: two float32 moments of each parameter, if a subclass says no else."""
        return sum(2 * 4 * p.numel() for p in model.parameters())
