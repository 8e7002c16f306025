"""Balance of experts without a loss (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2):
after an update, the bias by which a router chooses an expert moves a step towards the mean load. No gradient says what
the bias is, so it lies in a buffer, which checkpoints keep."""

import torch
from torch import Tensor

from model.moe import LOAD, MoE
from model.transformer import TransformerLM


class LoadBalance:
    """bias += rate · sign(mean load - load) for each expert of each layer, by the load of all micro-batches of a step.
    A rate of 0 only reports the loads."""

    collects = LOAD
    reduce = staticmethod(torch.add)

    def __init__(self, layers: list[MoE]):
        self.layers = layers

    @classmethod
    def of(cls, model: TransformerLM) -> list["LoadBalance"]:
        """The hook of a model with experts; without any, none."""
        layers = [block.mlp for block in model.blocks().values() if isinstance(block.mlp, MoE)]
        return [cls(layers)] if layers else []

    @torch.no_grad()
    def __call__(self, loads: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """loads (layers, experts): how many tokens chose each. A skipped step moves nothing. Returns the lowest and the
        highest load of any expert, relative to the mean of its layer."""
        means = loads.mean(1, keepdim=True)
        directions = torch.where(skipped, 0.0, (means - loads).sign())
        for layer, direction in zip(self.layers, directions, strict=True):
            if layer.router.selection_bias is not None:
                layer.router.selection_bias.add_(direction, alpha=layer.config.bias_rate)
        relative = loads / means
        return {"lowest_load": relative.amin(), "highest_load": relative.amax()}
