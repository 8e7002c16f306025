"""Activation checkpointing: a block saves only its input for the backward pass, which recomputes the rest to the same
bits (Chen et al. 2016, arXiv:1604.06174). Less memory, more time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> None:
    """Let the blocks of a model recompute their activations. The model is one that runs them by its `run_block`."""
    model.run_block = _recomputed


def _recomputed(block: nn.Module, x: Tensor, ctx: Any, cache: Any = None, carried: Any = None) -> Any:
    """Run a block. With a cache, or without gradients, nothing is saved for a backward pass anyway."""
    if cache is not None or not torch.is_grad_enabled():
        return block(x, ctx, cache, carried)
    return checkpoint(block, x, ctx, None, carried, use_reentrant=False, preserve_rng_state=ctx.training)
