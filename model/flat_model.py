"""The step of decoding that a model makes ready for one token of every row on a CPU: see model/flat_step.py."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import Cache
from model.flat_step import FlatAttention, FlatMLP, Now
from model.linear import Multiply, has_hooks, multiplier
from model.norm import Normer, normer
from model.transformer import Block, PaddedEmbedding, TransformerLM, run_block, softcapped

FlatBlock = tuple[Normer, FlatAttention, Normer, FlatMLP]


class FlatModel:
    """One token of every row, all at one position -> logits: what TransformerLM.forward and logits compute. It holds
    for the weights and KV caches of now, of which some are copied: another is made where a cache has grown, and for
    each `generate`, during which weights must not change."""

    def __init__(self, model: TransformerLM, blocks: Sequence[FlatBlock], head: Multiply, below: int):
        self.model = model
        self.blocks = blocks
        self.head = head
        self.norm = normer(model.norm)
        self.rotary = {rope: rope.rows(below) for rope in model.ropes}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """tokens (B, 1) at a position -> logits (B, V); caches them."""
        model = self.model
        rotary = {rope: tuple(of[position : position + 1][0] for of in rows) for rope, rows in self.rotary.items()}
        now = Now(position, rotary)
        x = F.embedding(tokens[:, 0], model.embedding.weight)
        if model.position_embedding is not None:
            x = x + model.position_embedding(torch.full((1, 1), position))[:, 0].to(x.dtype)
        for attention_norm, attend, mlp_norm, mlp in self.blocks:
            x = attend(attention_norm(x), x, now)
            x = mlp(mlp_norm(x), x)
        return softcapped(self.head(self.norm(x), None)[:, : model.vocab_size], model.config.logit_softcap)


def flat_model(model: TransformerLM, caches: Sequence[Cache], batch_size: int, below: int) -> FlatModel | None:
    """Make the step ready; below: a bound of the positions. None where it cannot be: not on a CPU, where a part has no
    `flat` for what is asked of it, or where hooks wait for a module to run."""
    unchanged = type(model) is TransformerLM and type(model.embedding) is PaddedEmbedding
    if not unchanged or model.run_block is not run_block or model.embedding.weight.device.type != "cpu":
        return None
    if any(has_hooks(module) for module in model.modules()):
        return None
    blocks = []
    for block, cache in zip(model.layers, caches, strict=True):
        if type(block) is not Block:
            return None
        attend, mlp = block.attention.flat(cache), block.mlp.flat(batch_size)
        if attend is None or mlp is None:
            return None
        blocks.append((normer(block.attention_norm), attend, normer(block.mlp_norm), mlp))
    return FlatModel(model, blocks, multiplier(model.lm_head.weight, None, batch_size), below)
