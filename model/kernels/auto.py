"""The kernel for whoever does not want to choose."""

import logging

import torch
from torch import Tensor

from common.errors import Unsupported
from model.kernels.base import Kernel, say_once
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.mask import Mask

SDPA_DEFAULT, MATMUL, FALLBACK = SDPA(), Matmul(), Naive()
MAX_SHORT_KEYS = 512  # keys. Beyond, products are still no slower, but what they keep outgrows all other activations


class Auto(Kernel):
    """The fused kernel, but on a CPU the products of kernel=matmul where they are faster, or the fused one cannot; and
    where this device or shape has no fused kernel, the naive one, with a warning."""

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type == "cuda":
            SDPA_DEFAULT.check(device, training, dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        try:
            return preferred(q.device, q, k, dropout)(q, k, v, mask, scale, dropout)
        except Unsupported as refusal:
            say_once(logging.WARNING, f"kernel auto takes the slow naive kernel: {refusal}")
            return FALLBACK(q, k, v, mask, scale, dropout)


def preferred(device: torch.device, q: Tensor, k: Tensor, dropout: float) -> Kernel:
    """What auto tries first, as measured (benchmarks/README.md): on a CPU the fused kernel is slow at training in
    bfloat16, and it drops no weights."""
    trains = torch.is_grad_enabled() and q.requires_grad
    short = trains and q.dtype == torch.bfloat16 and k.shape[1] <= MAX_SHORT_KEYS
    return MATMUL if device.type == "cpu" and (short or dropout) else SDPA_DEFAULT
