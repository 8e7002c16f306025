"""Naive attention kernel: the definition, written down. Every other kernel is tested against this one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.base import Kernel, announce, group_queries
from model.mask import Mask


class Naive(Kernel):
    """Computes all scores at once, in float32. Memory grows as T × S: for reading, testing and small shapes."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        announce("naive", q, k, v, mask)
        grouped = group_queries(q, k.shape[2]).float()  # (B, T, G, R, D)
        scores = scale * torch.einsum("btgrd,bsgd->bgrts", grouped, k.float())
        scores = scores.masked_fill(~mask.visible()[:, None, None], float("-inf"))  # (B, G, R, T, S)
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        out = torch.einsum("bgrts,bsgd->btgrd", weights, v.float())
        return out.flatten(2, 3).to(q.dtype)  # (B, T, H, Dv)
