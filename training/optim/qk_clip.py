"""QK-clip (Kimi K2, arXiv:2507.20534, section 2.1): after an update, query and key projections shrink in heads whose
attention logits have grown beyond a threshold, so that attention stays smooth whatever the optimizer does."""

import torch
from torch import Tensor

from common.errors import UserError
from model.transformer import TransformerLM


class QKClip:
    """γ = threshold / max_logit for each head beyond the threshold, and 1 for the others. Heads that share a key
    shrink together, by the smallest γ among them. What is frozen stays as it is."""

    collects = "max_logit"
    reduce = staticmethod(torch.maximum)

    def __init__(self, model: TransformerLM, threshold: float):
        self.threshold = threshold
        self.parts: list[tuple[int, float, Tensor]] = []  # layer, power, a view of the parameter: (heads, rows, ...)
        self.keys = []  # key heads of each layer
        for i, block in enumerate(model.blocks().values()):
            heads = []
            for name, layout in block.attention.layout().items():
                parameter = block.attention.get_parameter(name)
                views = layout.views(parameter.detach())
                clipped = [part for part in layout.parts if part.clip_power]
                heads += [layout.heads for _ in clipped]
                if parameter.requires_grad:
                    self.parts += [(i, part.clip_power, views[part.name]) for part in clipped]
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
        for layer, power, view in self.parts:
            scale = shared[layer].repeat_interleave(len(view) // len(shared[layer])) ** power
            view.mul_(scale.view(-1, *[1] * (view.ndim - 1)))
        return {"max_logit": max_logits.amax(), "clipped_heads": beyond.sum()}
