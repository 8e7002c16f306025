"""A matrix with or without a bias."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x · weightᵀ + bias, in the dtype of x, which is the weight's. The bias, a vector, may be kept in float32 beside a
    weight in bfloat16: it is rounded where it is added, and its gradient is float32 again."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
