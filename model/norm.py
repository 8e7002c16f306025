"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + 1e-6) over the last dimension, in float32; returns the caller's dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-6).to(x.dtype)
