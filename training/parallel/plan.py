"""What is applied to a model from outside before it trains, in one order. Model code is written for one device."""

from model.transformer import TransformerLM
from runtime.activation_checkpointing import checkpoint_activations
from runtime.precision import MixedPrecision, Precision, Weights
from runtime.world import World
from training.run.config import Run


def applied(run: Run, model: TransformerLM, world: World, weights: Weights | None = None) -> Precision:
    """Freeze what does not train; recompute activations; shard the matrices, or keep them whole with their
    low-precision copies. Compilation, where it is of whole losses, comes after (training.losses).

    DDP's gradients are summed by all_reduce after the last micro-batch, in float32, where they have been accumulated:
    torch.nn.parallel.DistributedDataParallel would sum the low-precision gradients of each micro-batch.

    weights: of a model that is to be sharded, whose own matrices are on the meta device.
    """
    run.optim.freeze(model)
    if run.activation_checkpointing:
        checkpoint_activations(model)
    if run.parallel.shards:
        from training.parallel.fsdp import ShardedPrecision  # a second of imports, which no other choice needs

        return ShardedPrecision(model, run.precision, world, weights)
    return MixedPrecision(model, run.precision, world)
