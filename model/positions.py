"""What says where a token stands, and is added to its embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """A row for each position of the context (Radford et al. 2019)."""

    def __init__(self, context_length: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_length, d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) below the context length -> (B, T, d). Negative ones, padding, have the first row."""
        return F.embedding(positions.clamp(min=0), self.weight)
