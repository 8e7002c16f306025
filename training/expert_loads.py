"""Loads of experts during training: how evenly the tokens of the validation text choose among them."""

import torch

from data.shards.token_files import TokenStream
from model.moe import LOAD
from model.placement import Placement
from model.transformer import TransformerLM
from training.attention_stats import first_windows


@torch.no_grad()
def expert_loads(
    model: TransformerLM, stream: TokenStream, length: int, batch_size: int, document_start: int | None = None
) -> dict[str, float]:
    """Of each layer with experts, as `experts/layer_0/load_3`: the tokens that chose an expert, relative to the mean
    over the experts, in the stream's first windows. Without experts, none. The arguments are attention_stats'."""
    batch = first_windows(model, stream, length, batch_size, document_start)
    aux = model(batch.inputs, Placement.of_batch(batch), collect=frozenset({LOAD})).aux
    return {
        f"experts/layer_{name.split('.')[1]}/load_{expert}": load
        for name, loads in aux.items()
        for expert, load in enumerate((loads / loads.mean()).tolist())
    }
