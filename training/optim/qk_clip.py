"""QK-clip (Kimi K2, arXiv:2507.20534, section 2.1): after an update, query and key projections shrink in heads whose
attention logits have grown beyond a threshold, so that attention stays smooth whatever the optimizer does."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError
from model.layout import ParamLayout
from model.transformer import TransformerLM
from runtime.precision import Shard


class QKClip:
    """γ = threshold / max_logit for each head beyond the threshold, and 1 for the others. Heads that share a key
    shrink together, by the smallest γ among them. What is frozen stays as it is."""

    collects = "max_logit"
    reduce = staticmethod(torch.maximum)

    def __init__(self, model: TransformerLM, threshold: float, shards: Mapping[str, Shard] | None = None):
        """shards: the model's parameters by their names, as this process holds them; None: whole."""
        shards = shards or {name: Shard.whole(parameter) for name, parameter in model.named_parameters()}
        self.threshold = threshold
        self.clipped: list[tuple[int, ParamLayout, Shard]] = []  # with the layer
        self.keys = []  # key heads of each layer
        path_of = {module: path for path, module in model.named_modules()}
        for i, block in enumerate(model.blocks().values()):
            heads = []
            for name, layout in block.attention.layout().items():
                clipped = [part for part in layout.parts if part.clip_power]
                heads += [layout.heads for _ in clipped]
                shard = shards[f"{path_of[block.attention]}.{name}"]
                if clipped and shard.local.requires_grad:
                    self.clipped.append((i, layout, shard))
            if not heads:
                raise UserError(
                    f"optim.qk_clip={threshold} scales the rows that make a head's queries and keys, and the attention "
                    f"of layer {i} has none with a clip_power in its layout(): leave optim.qk_clip unset"
                )
            self.keys.append(min(heads))

    @torch.no_grad()
    def __call__(self, max_logits: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """max_logits (layers, heads): the largest attention logits of the step, before the update. A skipped step clips
        nothing. Returns the largest of any head, and how many heads were beyond the threshold."""
        if len(max_logits) != len(self.keys):
            raise UserError(
                f"optim.qk_clip={self.threshold} goes by the {self.collects} of every layer, and {len(max_logits)} of "
                f"{len(self.keys)} return it: return it from their attention too, or leave optim.qk_clip unset"
            )
        beyond = (max_logits > self.threshold) & ~skipped
        gamma = torch.where(beyond, self.threshold / max_logits, 1.0)
        shared = [of_layer.unflatten(0, (keys, -1)).amin(1) for of_layer, keys in zip(gamma, self.keys, strict=True)]
        for layer, layout, shard in self.clipped:
            scale = _of_rows(layout, shared[layer])[shard.rows()]
            shard.local.mul_(scale.view(-1, *[1] * (shard.local.ndim - 1)))
        return {"max_logit": max_logits.amax(), "clipped_heads": beyond.sum()}


def _of_rows(layout: ParamLayout, gamma: Tensor) -> Tensor:
    """What each row of a parameter is multiplied by, (rows,), for the γ of the layer's key heads."""
    scale = gamma.new_ones(layout.rows)
    for part in layout.parts:
        of_heads = layout.views(scale)[part.name]  # (heads, part rows)
        of_heads.mul_(gamma.repeat_interleave(layout.heads // len(gamma))[:, None] ** part.clip_power)
    return scale
