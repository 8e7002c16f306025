"""Kernel auto: selects a kernel by device, dtype, sequence length and whether gradients are needed."""

import logging

import torch
from torch import Tensor

from common.errors import Unsupported
from model.kernels.base import Kernel, say_once
from model.kernels.matmul import Matmul
from model.kernels.naive import Naive
from model.kernels.sdpa import SDPA
from model.mask import Mask

SDPA_DEFAULT = SDPA()
MATMUL = Matmul()
FALLBACK = Naive()
# Beyond, kernel=matmul is still no slower, but the weights it saves outgrow all other activations.
MAX_MATMUL_KEYS = 512


class Auto(Kernel):
    """Uses the fused kernel; on a CPU kernel=matmul if it is faster or the fused one cannot drop weights; and with a
    warning the naive one, if this device or shape has no fused kernel."""

    def check(self, device: torch.device, training: bool, dropout: bool) -> None:
        if device.type == "cuda":
            SDPA_DEFAULT.check(device, training, dropout)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
        try:
            return preferred(q.device, q, k, dropout)(q, k, v, mask, scale, dropout)
        except Unsupported as error:
            say_once(logging.WARNING, f"kernel auto takes the slow naive kernel: {error}")
            return FALLBACK(q, k, v, mask, scale, dropout)


def preferred(device: torch.device, q: Tensor, k: Tensor, dropout: float) -> Kernel:
    """Choose the kernel that auto tries first, as measured (benchmarks/README.md): on a CPU the fused kernel is slow to
    train in bfloat16, and has no dropout."""
    trains = torch.is_grad_enabled() and q.requires_grad
    short = trains and q.dtype == torch.bfloat16 and k.shape[1] <= MAX_MATMUL_KEYS
    return MATMUL if device.type == "cpu" and (short or dropout) else SDPA_DEFAULT
