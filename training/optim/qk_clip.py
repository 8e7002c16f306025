"""QK-clip (Kimi K2, arXiv:2507.20534, section 2.1): after an update, query and key projections shrink in heads whose
attention logits have grown beyond a threshold, so that attention stays smooth whatever the optimizer does."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.transformer import TransformerLM

# The power of γ by which each part is scaled, so that every score of the head becomes γ times what it was. The rope key
# of MLA is no head's own: it stays, and q_rope makes up for it.
POWERS = {"q": 0.5, "k": 0.5, "q_nope": 0.5, "k_nope": 0.5, "q_rope": 1.0}


class Clipped(NamedTuple):
    """Result of one step's QK-clip; scalars on the device."""

    max_logit: Tensor  # the largest score of any head, before the update
    heads: Tensor  # how many were beyond the threshold


class QKClip:
    """γ = threshold / max_logit for each head beyond the threshold, and 1 for the others. Heads that share a key
    shrink together, by the smallest γ among them."""

    collects = "max_logit"
    reduce = staticmethod(torch.maximum)

    def __init__(self, model: TransformerLM, threshold: float):
        self.threshold = threshold
        named = dict(model.named_parameters())
        self.parts: list[tuple[int, float, Tensor]] = []  # layer, power, a view of the parameter: (heads, rows, ...)
        self.keys = []  # key heads of each layer
        for i, block in enumerate(model.layers):
            heads = []
            for name, split in block.attention.param_layout().items():
                bias = f"{name.removesuffix('weight')}bias"
                for stored in (named.get(f"layers.{i}.attention.{each}") for each in (name, bias)):
                    views = {} if stored is None else split.views(stored.detach())
                    self.parts += [(i, POWERS[part], view) for part, view in views.items() if part in POWERS]
                    heads += [split.heads for part in views if part in POWERS]
            self.keys.append(min(heads))

    @torch.no_grad()
    def __call__(self, max_logits: Tensor, skipped: Tensor) -> Clipped:
        """max_logits (layers, heads): the largest attention logits of the step. A skipped step clips nothing."""
        beyond = (max_logits > self.threshold) & ~skipped
        gamma = torch.where(beyond, self.threshold / max_logits, 1.0)
        shared = [of_layer.unflatten(0, (keys, -1)).amin(1) for of_layer, keys in zip(gamma, self.keys, strict=True)]
        for layer, power, view in self.parts:
            scale = shared[layer].repeat_interleave(len(view) // len(shared[layer])) ** power
            view.mul_(scale.view(-1, *[1] * (view.ndim - 1)))
        return Clipped(max_logits.amax(), beyond.sum())
