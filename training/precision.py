"""Float32 is the truth: what the optimizer updates and what is saved. Matrix products may run on copies of it."""

import copy
import logging

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` takes bf16 where the device multiplies it natively, else fp32, and says which it took."""
    if precision != "auto":
        return precision
    native = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }.get(device.type, lambda: False)()
    reason = "multiplies bfloat16 natively" if native else "has no native bfloat16"
    chosen = "bf16" if native else "fp32"
    logging.getLogger("headroom").info(f"precision {chosen}: this {device.type} {reason}")
    return chosen


class Working:
    """The model that forward and backward run on.

    In float32 it is the model itself. In bfloat16 it is a twin that shares the vectors and holds copies of the
    matrices, made once per step; their gradients are added up in float32, micro-batch by micro-batch.
    """

    def __init__(self, model: nn.Module, precision: str):
        dtype = DTYPES[precision]
        self.masters, self.copies = [], []
        twins = {}  # what deepcopy shall put in place of a parameter: the vector itself, or a matrix's copy
        for parameter in model.parameters():
            twins[id(parameter)] = parameter
            if dtype != torch.float32 and parameter.ndim >= 2:
                twins[id(parameter)] = nn.Parameter(parameter.detach().to(dtype))
                self.masters.append(parameter)
                self.copies.append(twins[id(parameter)])
        self.model = copy.deepcopy(model, twins) if self.copies else model

    @torch.no_grad()
    def refresh(self) -> None:
        """Call before the first forward of a step."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.masters)

    def collect_gradients(self) -> None:
        """Call after each backward: moves the copies' gradients to the float32 parameters."""
        for master, twin in zip(self.masters, self.copies, strict=True):
            if master.grad is None:
                master.grad = twin.grad.float()
            else:
                master.grad.add_(twin.grad)
            twin.grad = None
