"""The kernel for whoever does not want to choose."""

from torch import Tensor

from model.kernels.base import Kernel
from model.kernels.naive import Naive
from model.kernels.sdpa import DEVICES, SDPA
from model.mask import Mask

FUSED, FALLBACK = SDPA(), Naive()


class Auto(Kernel):
    """A fused kernel where this device has one; elsewhere the naive one, as its announcement says."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        kernel = FUSED if q.device.type in DEVICES else FALLBACK
        return kernel(q, k, v, mask, scale)
