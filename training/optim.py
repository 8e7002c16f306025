"""Optimizers: typed settings that build a torch.optim.Optimizer."""

import inspect
import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import nn

from common.settings import FrozenSettings
from model.transformer import TransformerLM
from training.qk_clip import QKClip


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


class AdamW(Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def kept(self, parameter: nn.Parameter) -> dict[str, Kept]:
        """What the state of a parameter is after a step."""
        return {"step": Kept.count(), "exp_avg": Kept(parameter.shape), "exp_avg_sq": Kept(parameter.shape, 0.0)}


class OptimConfig(FrozenSettings, ABC):
    lr: float | None = Field(None, gt=0)  # peak; unset, it derives from d_model
    qk_clip: float | None = Field(None, gt=0)  # the largest score a head may have and keep its scale

    @property
    def peaks(self) -> dict[str, float]:
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


class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Decay applies to matrices, embeddings included, and not to
    vectors. Unset, lr is 0.5 / d_model: the best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466)."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-30)  # smaller ones are zero in float32
    weight_decay: float = Field(0.1, ge=0)

    def derive(self, d_model: int) -> Self:
        return self.model_copy(update={"lr": self.lr or 0.5 / d_model})

    def build(self, model: nn.Module) -> AdamW:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
