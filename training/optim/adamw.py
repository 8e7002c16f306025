"""AdamW, PyTorch's fused one, and its settings."""

from typing import Self

import torch
from pydantic import Field
from torch import nn

from runtime.fast_startup import UncompiledOptimizer, without_compiler_marks
from training.optim.base import OptimConfig, StateTensor


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(without_compiler_marks(torch.optim.AdamW.step))

    def state_layout(self, parameter: nn.Parameter) -> dict[str, StateTensor]:
        """State tensors of a parameter after a step, by name."""
        return {
            "step": StateTensor.count(),
            "exp_avg": StateTensor(parameter.shape),
            "exp_avg_sq": StateTensor(parameter.shape, 0.0),
        }


class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Decay applies to matrices, embeddings included, and not to
    vectors. Unset, lr is 0.5 / d_model: the best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466)."""

    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(ge=1e-30)  # smaller ones are zero in float32
    weight_decay: float = Field(ge=0)

    def derive(self, d_model: int) -> Self:
        return self.model_copy(update={"lr": self.lr or 0.5 / d_model})

    def build(self, model: nn.Module) -> AdamW:
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
