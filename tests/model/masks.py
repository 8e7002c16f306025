"""Masks that tests of kernels and of their statistics are held under: two sequences of LENGTH tokens."""

import torch

from model.mask import Mask, Pattern

LENGTH = 17
SITUATIONS = ["plain", "documents", "padding", "padding behind"]


def mask_of(situation: str, pattern: Pattern) -> Mask:
    places, docs = torch.arange(LENGTH).expand(2, -1), None
    if situation == "documents":
        docs = torch.tensor([[0] * 6 + [1] + [2] * 10, [0] * 2 + [1] * 13 + [2] * 2])
        places = torch.arange(LENGTH) - torch.searchsorted(docs, docs)
    elif situation == "padding":
        places = torch.stack([torch.arange(LENGTH) - 6, torch.arange(LENGTH) - 1]).clamp(min=-1)
    elif situation == "padding behind":
        places = torch.arange(LENGTH).where(torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]]), -1)
    return Mask(places, places, situation in ("plain", "padding behind"), pattern, docs, docs)
