"""The whole model of a run whose processes share it."""

import torch

from model.transformer import TransformerLM
from runtime.fast_startup import allocate_empty
from runtime.precision import Shard
from runtime.world import World
from training.state import TrainState


@torch.no_grad()
def whole_model(state: TrainState) -> TransformerLM | None:
    """The float32 model, whole: what is trained itself where every process has it, else a copy, made in the first
    process alone. Call it in all processes; None in the others."""
    shards = state.precision.shards
    if all(state.model.get_parameter(name) is shard.local for name, shard in shards.items()):
        return state.model
    weights = {name: _gathered(shard, state.world) for name, shard in shards.items()}
    if not state.world.is_first:
        return None
    with torch.device("meta"):
        model = TransformerLM(state.model.config, state.model.vocab_size)
    model = allocate_empty(model)  # on the CPU: no device need hold it whole
    for name, weight in (weights | dict(state.model.named_buffers())).items():
        model.get_parameter(name).copy_(weight) if name in weights else model.get_buffer(name).copy_(weight)
    return model


def _gathered(shard: Shard, world: World) -> torch.Tensor | None:
    """The rows of all processes, in the first one."""
    if shard.is_whole:
        return shard.local
    per_row = shard.shape[1:].numel()
    sizes = [(rows.stop - rows.start) * per_row for rows in map(shard.rows, range(world.size))]
    nothing = shard.local.new_empty(0)
    outgoing = [shard.local.detach().flatten(), *[nothing] * (world.size - 1)]
    pieces = world.exchanged(outgoing, sizes if world.is_first else [0] * world.size)
    return torch.cat(pieces).view(shard.shape) if world.is_first else None
