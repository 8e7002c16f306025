"""The kernel for whoever does not want to choose."""

import logging

from torch import Tensor

from model.errors import Unsupported
from model.kernels.base import Kernel, say_once
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.mask import Mask

FUSED, FALLBACK = SDPA(), Naive()


class Auto(Kernel):
    """The fused kernel; where this device or shape has none, the naive one, with a warning."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        try:
            return FUSED(q, k, v, mask, scale, dropout)
        except Unsupported as refusal:
            say_once(logging.WARNING, f"kernel auto takes the slow naive kernel: {refusal}")
            return FALLBACK(q, k, v, mask, scale, dropout)
