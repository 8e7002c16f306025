"""Context: what all layers share in one forward pass."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from model.cache import CacheView
from model.mask import Mask, Pattern, made_once
from model.placement import Placement
from model.rope import Rope


@dataclass(frozen=True)
class Context:
    """What all layers share in one forward pass: where tokens stand, and rotary tables. Built by TransformerLM; layers
    only read it."""

    at: Placement
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]  # float32 cos and sin, one entry per distinct Rope
    training: bool = False  # dropout is on
    collect: frozenset[str] = frozenset()  # names of the auxiliary outputs to return
    _masks: dict[Any, Mask] = field(default_factory=dict, init=False, repr=False, compare=False)

    def dropped(self, probability: float) -> float:
        """The dropout probability in force: 0 outside training."""
        return probability if self.training else 0.0

    def drop(self, x: Tensor, probability: float) -> Tensor:
        """Dropout (Srivastava et al. 2014); outside training, x unchanged."""
        return F.dropout(x, probability) if self.training and probability else x

    def mask(self, pattern: Pattern, view: CacheView | None) -> Mask:
        """The mask of this pattern, over what a cache returned or, without one, over the tokens themselves. Layers of
        one pattern share it: caches alike have the same positions in the same rows."""
        at, k_pos = self.at, self.at.positions if view is None else view.positions
        make = functools.partial(Mask, at.positions, k_pos, at.is_contiguous, pattern, at.docs, at.docs)
        return made_once(self._masks, (pattern, k_pos.shape), make)

    def rotated(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Apply RoPE to x (B, T, H, D) by its tokens' positions; without a rope, x unchanged."""
        return x if rope is None else rope.rotate(x, self.rotary[rope])
