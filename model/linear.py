"""Linear layer whose bias may stay in float32 beside a low-precision weight."""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x · weightᵀ + bias, in the dtype of x, which is the weight's. Mixed precision copies matrices to bfloat16 and
    leaves the bias in float32: it is rounded where it is added, and its gradient is float32."""

    def reset_parameters(self) -> None:
        """Draw nothing: model.initialise does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
