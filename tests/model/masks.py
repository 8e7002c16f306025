"""Masks for tests of kernels and statistics: two sequences of LENGTH tokens."""

import torch

from model.mask import Mask, Pattern

LENGTH = 17
SITUATIONS = ["plain", "documents", "padding", "padding behind"]


def mask_of(situation: str, pattern: Pattern) -> Mask:
    positions, docs = torch.arange(LENGTH).expand(2, -1), None
    if situation == "documents":
        docs = torch.tensor([[0] * 6 + [1] + [2] * 10, [0] * 2 + [1] * 13 + [2] * 2])
        positions = torch.arange(LENGTH) - torch.searchsorted(docs, docs)
    elif situation == "padding":
        positions = torch.stack([torch.arange(LENGTH) - 6, torch.arange(LENGTH) - 1]).clamp(min=-1)
    elif situation == "padding behind":
        positions = torch.arange(LENGTH).where(torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]]), -1)
    return Mask(positions, positions, situation in ("plain", "padding behind"), pattern, docs, docs)
