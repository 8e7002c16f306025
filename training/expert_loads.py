"""Loads of experts during training: how evenly the tokens of the validation text choose among them."""

import torch

from data.batches import count_windows, read_windows
from data.shards.token_files import TokenStream
from model.moe import LOAD
from model.placement import Placement
from model.transformer import TransformerLM

TOKENS = 16_384  # about how many are asked; far fewer are one or two texts, which choose as no other does


@torch.no_grad()
def expert_loads(
    model: TransformerLM, stream: TokenStream, length: int, batch_size: int, document_start: int | None = None
) -> dict[str, float]:
    """Of each layer with experts, as `experts/layer_0/load_3`: the tokens that chose an expert, relative to the mean
    over the experts, in the stream's first windows. The arguments are attention_stats'."""
    device, totals = next(model.parameters()).device, {}
    windows = range(min(count_windows(stream, length), max(1, TOKENS // length)))
    for start in range(0, len(windows), batch_size):
        batch = read_windows(stream, length, list(windows[start : start + batch_size]), document_start).to(device)
        aux = model(batch.inputs, Placement.of_batch(batch), collect=frozenset({LOAD})).aux
        totals = {name: totals.get(name, 0) + load for name, load in aux.items()}
    return {
        f"experts/layer_{name.split('.')[1]}/load_{expert}": load
        for name, loads in totals.items()
        for expert, load in enumerate((loads / loads.mean()).tolist())
    }
