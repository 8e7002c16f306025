"""nanoGPT as its users run it, from a checkout of it."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

BETAS, DECAY, CLIP = (0.9, 0.99), 0.1, 1.0
Step = Callable[[Tensor, Tensor], object]


def nanogpt_of(
    checkout: Path,
    device: torch.device,
    shape: Mapping[str, int],
    lr: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, without dropout and biases, and its optimizer as it builds it. shape: n_layers, n_heads, d_model,
    context_length, vocab. model.py is imported under a name that
    leaves our own package `model` alone."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    names = {"n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model", "block_size": "context_length"}
    config = theirs.GPTConfig(
        **{its: shape[ours] for its, ours in names.items()}, vocab_size=shape["vocab"], dropout=0.0, bias=False
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many parameters it has
        model = theirs.GPT(config).to(device)
        return model, model.configure_optimizers(DECAY, lr, BETAS, device.type)


def autocast_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    precision: str,
) -> Step:
    """A step as most loops take it; bf16 is by autocast. The step returns its loss."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            mean = loss(inputs, targets)
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean.detach()

    return step
