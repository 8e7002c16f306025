"""AdamW, PyTorch's fused one, and its settings."""

from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import nn

from model.layout import Kind, ParamLayout
from model.transformer import TransformerLM
from runtime.fast_startup import UncompiledOptimizer, without_compiler_marks
from runtime.precision import Precision
from training.optim.base import OptimConfig, StateTensor, shards_of
from training.optim.groups import parameter_groups


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(without_compiler_marks(torch.optim.AdamW.step))

    def state_layout(self, parameter: nn.Parameter) -> dict[str, StateTensor]:
        """State tensors of a parameter after a step, by name."""
        return {"step": StateTensor.count(), **moments(parameter.shape)}


def moments(shape: torch.Size) -> dict[str, StateTensor]:
    """The means of gradients and of their squares."""
    return {"exp_avg": StateTensor(shape), "exp_avg_sq": StateTensor(shape, 0.0)}


class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Decay applies to matrices, embeddings included, and not to
    vectors. Unset, lr is 0.5 / d_model: the best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466)."""

    lr_times_width: ClassVar[float] = 0.5  # of an lr that is unset
    bias_lr_factor: ClassVar[float] = 1.0  # of an unset bias_lr, times lr

    bias_lr: float | None = Field(gt=0)  # peak for biases
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(ge=1e-30)  # smaller ones are zero in float32
    weight_decay: float = Field(ge=0)

    @property
    def base_lrs(self) -> dict[str, float]:
        return {"lr": self.lr} | ({} if self.bias_lr in (None, self.lr) else {"bias_lr": self.bias_lr})

    def derive(self, d_model: int) -> Self:
        lr = self.lr or self.lr_times_width / d_model
        return self.model_copy(update={"lr": lr, "bias_lr": self.bias_lr or self.bias_lr_factor * lr})

    def build(self, model: TransformerLM, precision: Precision | None = None) -> AdamW:
        groups = parameter_groups(model, self.groups, self.options, shards_of(model, precision)[0])
        return AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def options(self, layout: ParamLayout) -> dict[str, Any]:
        """Options of AdamW for a parameter."""
        return {
            "lr": self.bias_lr or self.lr if layout.kind is Kind.BIAS else self.lr,
            "weight_decay": 0.0 if layout.fan_in is None else self.weight_decay,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
        }

    def state_layout(self, layout: ParamLayout, shape: torch.Size) -> dict[str, StateTensor]:
        return {"step": StateTensor.count(), **moments(shape)}
