"""Naive attention kernel: the definition, written down. Every other kernel is tested against this one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.base import Attended, Case, How, Kernel, announce, group_queries
from model.mask import Mask
from model.upcast import upcast


class Naive(Kernel):
    """Computes all scores at once, in float32. Memory grows as T × S: for reading, testing and small shapes."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask, how: How) -> Attended:
        announce("naive", Case.of(q, k, v, mask, how))
        v = how.values(k, v)
        grouped = upcast(group_queries(q, k.shape[2]))  # (B, T, G, R, D)
        scores = how.scale * torch.einsum("btgrd,bsgd->bgrts", grouped, upcast(k))
        scores = scores.masked_fill(~mask.visible()[:, None, None], float("-inf"))  # (B, G, R, T, S)
        weights = F.dropout(scores.softmax(dim=-1), how.dropout)
        out = torch.einsum("bgrts,bsgd->btgrd", weights, upcast(v))
        lse = scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(2) if how.lse else None
        return Attended(out.flatten(2, 3).to(q.dtype), lse)  # (B, T, H, Dv), (B, T, H)
