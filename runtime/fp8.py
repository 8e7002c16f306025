"""Matrix products in float8, forward and backward, by torchao: about twice the throughput of bfloat16 on a Hopper GPU.

Each product scales its two operands by their largest magnitude, rounds them to float8 (Micikevicius et al. 2022,
arXiv:2209.05433) and adds up in float32. The scales are recomputed for every product: there is no state beside the
weights, and a resumed run is the same run.
"""

import logging

import torch
from torch import nn

from common.errors import UserError
from common.invocation import check_package

log = logging.getLogger("headroom")
MIN_CAPABILITY = (8, 9)  # compute capability: Ada, and Hopper after it
MULTIPLE = 16  # of which both sides of a matrix must be one


def check_fp8(device: torch.device) -> None:
    """Raises UserError where nothing multiplies float8 here."""
    check_package("torchao", "precision=fp8", "fp8")
    if device.type != "cuda":
        raise UserError(f"precision=fp8: this {device.type} has no float8 products: choose precision=auto")
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        raise UserError(
            f"precision=fp8: this GPU's compute capability is {'.'.join(map(str, found))}, float8 products need "
            f"{'.'.join(map(str, MIN_CAPABILITY))}: choose precision=auto"
        )


def multiply_in_fp8(model: nn.Module) -> nn.Module:
    """Convert, in place, the linear layers that can multiply in float8; their parameters stay what they are, bfloat16.
    The others are named in a warning. Embeddings and head are no linear layers, and stay as they are. Elsewhere than on
    a GPU the products are imitated. Raises UserError without torchao."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fit = {name for name, module in linear.items() if not any(side % MULTIPLE for side in module.weight.shape)}
    device = next(model.parameters()).device
    check_package("torchao", "precision=fp8", "fp8")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda")
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in fit, config=config)
    log.info(
        f"precision fp8: {len(fit)} of {len(linear)} linear layers multiply in float8; compile=true makes that fast"
    )
    if len(fit) < len(linear):
        left = sorted(linear.keys() - fit)
        log.warning(
            f"precision fp8: {len(left)} linear layers stay in bfloat16, whose sides are no multiples of {MULTIPLE}: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
        )
    return model
