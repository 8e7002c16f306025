"""What says where a token stands, and is added to its embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Dimensions


class Learned(nn.Module):
    """A vector for each position of the context (Radford et al. 2018)."""

    def __init__(self, dimensions: Dimensions):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dimensions.context_length, dimensions.d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) below the context length -> (B, T, d); padding is given the first."""
        return F.embedding(positions.clamp(min=0), self.weight)


def position_embedding(dimensions: Dimensions) -> nn.Module | None:
    """What gives (B, T) positions vectors (B, T, d) to add to the embedding, where the model has such a thing."""
    return Learned(dimensions) if dimensions.position_embedding == "learned" else None
